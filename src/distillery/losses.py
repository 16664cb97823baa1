"""Distillation losses: pure functions of tensors, in nats, one value per supervised position.

Two spaces. A row of a *distribution term* is one supervised position with K outcomes: the K labels of an example
(exact and small), or the K tokens of a vocabulary at one completion position. No formula depends on which; each
docstring says where the term is meant to be used. `representation` terms compare hidden states instead.

One denominator. A term returns one value per row; :func:`reduce` sums them and divides by the number of supervised
positions of the *whole optimizer step*, all accumulated micro-batches together. Micro-batches of any size then add up
to the gradient of the one big batch.

Numbers. Everything is computed in float32 (float64 if the student's logits are float64), whatever the model's dtype.
A teacher's probability may be exactly 0 (log-probability -inf). Its logarithm is held at `LOG_FLOOR`, the smallest
normal float32, so that the terms which divide by it (`reverse_kl`, and `skew_reverse_kl` at `alpha` 0) stay finite.
A student's logits must be finite: exclude an outcome with a large negative number such as -1e4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_FLOOR = math.log(torch.finfo(torch.float32).tiny)  # -87.34
IGNORE = -100  # a hard target that counts for nothing, as in torch
PADDING = 512  # see `shared_vocabulary`

# --------------------------------------------------------------------------------------------------------------------
# Terms over distributions
# --------------------------------------------------------------------------------------------------------------------


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
    return _kl(*_tempered(student_logits, teacher_logprobs, temperature))


def reverse_kl(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(s || p) = sum_k s_k (log s_k - log p_k): mode-seeking.

    Where the teacher's tempered probability is below exp(`LOG_FLOOR`) = 1.2e-38 it counts as that, so one outcome
    costs at most 87.34 nats instead of an infinity.

    Args, Raises: as for :func:`kl`.
    Returns: [n] nats, in [0, 87.34]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models", eq. 1.
    """
    return _reverse_kl(*_tempered(student_logits, teacher_logprobs, temperature))


def jsd(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    temperature: float = 1.0,
    beta: float = 0.5,
    scaled: bool = False,
) -> Tensor:
    """Generalized Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(s || m) with m = beta p + (1 - beta) s.

    `beta` is the teacher's weight in the mixture, as in the paper and in TRL. Its ends: the divergence goes to 0
    as beta goes to 0 or 1, in value *and in gradient*, like beta KL(p || s) and (1 - beta) KL(s || p). So the
    continuous value at an end is 0, which would train nothing without a word; returning a KL there, as TRL does, makes
    the loss jump by orders of magnitude between 0.01 and 0. Neither is what a user means, so the ends are refused and
    the message names the term to use instead.

    `scaled=True` divides by beta (1 - beta). That is continuous on the closed interval: exactly KL(p || s) at 0, the
    Jeffreys-like middle, exactly KL(s || p) at 1, and its gradient's size hardly depends on beta. Use it to sweep
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
        return _jsd(*_tempered(student_logits, teacher_logprobs, temperature), beta)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1], not {beta}")
    if beta == 0:
        return kl(student_logits, teacher_logprobs, temperature)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logprobs, temperature)
    return _jsd(*_tempered(student_logits, teacher_logprobs, temperature), beta) / (beta * (1 - beta))


def skew_kl(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """Skew Kullback-Leibler divergence KL(p || alpha p + (1 - alpha) s): forward KL with a bounded gradient.

    Args: as for :func:`kl`, and `alpha` in [0, 1): 0 is :func:`kl`; 1 would be 0 whatever the student says.
    Returns: [n] nats, in [0, -log alpha]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Raises: as :func:`kl`; ValueError for `alpha` outside [0, 1).
    Source: Ko et al. 2024, "DistiLLM: Towards Streamlined Distillation for Large Language Models", section 3.1 (SKL).
    """
    return _skew_kl(*_tempered(student_logits, teacher_logprobs, temperature), alpha)


def skew_reverse_kl(
    student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0, alpha: float = 0.1
) -> Tensor:
    """Skew reverse Kullback-Leibler divergence KL(s || (1 - alpha) p + alpha s): reverse KL that a zero cannot blow up.

    Args: as for :func:`kl`, and `alpha` in [0, 1): 0 is :func:`reverse_kl`; 1 would be 0 whatever the student says.
    Returns: [n] nats, in [0, -log alpha]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Raises: as :func:`kl`; ValueError for `alpha` outside [0, 1).
    Source: Ko et al. 2024, "DistiLLM", section 3.1 (SRKL).
    """
    return _skew_reverse_kl(*_tempered(student_logits, teacher_logprobs, temperature), alpha)


def tvd(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """Total variation distance 1/2 sum_k |p_k - s_k|: the share of the mass on which teacher and student differ.

    Args, Raises: as for :func:`kl`.
    Returns: [n], dimensionless, in [0, 1]. Denominator: none, one value per row.
    Space: labels or vocabulary.
    Source: Wen et al. 2023, "f-Divergence Minimization for Sequence-Level Knowledge Distillation", the TVD
        loss, per step.
    """
    return _tvd(*_tempered(student_logits, teacher_logprobs, temperature))


def cross_entropy(student_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy -sum_k y_k log s_k at T = 1, with y a class (then -log s_y) or a distribution.

    Args:
        student_logits: [n, K], any float dtype, finite.
        targets: [n] int64 in 0..K-1, or -100 for a row without a gold label (value 0); or [n, K] probabilities.
    Returns: [n] nats, in [0, inf). Denominator: none, one value per row; a row of -100 is no supervised position
        and must not be counted in it.
    Space: labels or vocabulary.
    Raises: ValueError for shapes that do not fit, naming both, or for classes outside 0..K-1.
    """
    logits = _working(student_logits)
    if logits.dim() != 2 or (targets.shape != logits.shape if targets.is_floating_point() else targets.dim() != 1):
        raise ValueError(
            f"student_logits [n, K] and targets [n] of integers or [n, K] of probabilities, "
            f"not {_shape(student_logits)} and {_shape(targets)}"
        )
    if targets.is_floating_point():
        return -(targets.to(logits.dtype) * logits.log_softmax(-1)).sum(-1)
    if len(targets) != len(logits):
        raise ValueError(f"one target per row: student_logits {_shape(student_logits)}, targets {_shape(targets)}")
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= logits.shape[1]))
    if bool(wrong.any()):
        raise ValueError(f"targets must be in 0..{logits.shape[1] - 1} (or {IGNORE}), not {int(targets[wrong][0])}")
    return F.cross_entropy(logits, targets.long(), ignore_index=IGNORE, reduction="none")


def temperature_factor(term: str, temperature: float) -> float:
    """What to multiply `term` by so that its gradient's size does not depend on a high temperature.

    T**2 for the divergences, which are quadratic near agreement (Hinton et al. 2015, section 2); T for `tvd`, which is
    linear there; 1 for `ce`, which has no temperature.

    Raises: ValueError for an unknown term.
    """
    powers = {"ce": 0, "tvd": 1} | {name: 2 for name in DISTRIBUTION_TERMS if name != "tvd"}
    if term not in powers:
        raise ValueError(f"unknown loss term {term!r}; known: {', '.join(powers)}")
    return float(temperature) ** powers[term]


# What the terms share: log s and log p at the temperature, and p. Several terms of one mix then cost one softmax each.


def _tempered(student_logits: Tensor, teacher_logprobs: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    if student_logits.dim() != 2 or student_logits.shape != teacher_logprobs.shape:
        raise ValueError(
            f"student_logits and teacher_logprobs must be two equal [n, K], "
            f"not {_shape(student_logits)} and {_shape(teacher_logprobs)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    student = _working(student_logits)
    teacher = teacher_logprobs.to(student.dtype)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_p = teacher.log_softmax(-1)
    # p before the floor: an outcome that the teacher excludes weighs exactly nothing, however small the student's
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
        raise ValueError(f"alpha must be in [0, 1), not {alpha}: at 1 the loss is 0 whatever the student says")


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


_TERMS: dict[str, Callable[..., Tensor]] = {
    "kl": lambda rows, beta, alpha: _kl(*rows),
    "reverse_kl": lambda rows, beta, alpha: _reverse_kl(*rows),
    "jsd": lambda rows, beta, alpha: _jsd(*rows, beta),
    "skew_kl": lambda rows, beta, alpha: _skew_kl(*rows, alpha),
    "skew_reverse_kl": lambda rows, beta, alpha: _skew_reverse_kl(*rows, alpha),
    "tvd": lambda rows, beta, alpha: _tvd(*rows),
}


def _uniform(name: str) -> Callable[..., Tensor]:
    def term(student_logits, teacher_logprobs, *, temperature=1.0, beta=0.5, alpha=0.1):
        return _TERMS[name](_tempered(student_logits, teacher_logprobs, temperature), beta, alpha)

    term.__name__ = name
    return term


# name -> f(student_logits [n, K], teacher_logprobs [n, K], *, temperature=1.0, beta=0.5, alpha=0.1) -> [n]
DISTRIBUTION_TERMS: dict[str, Callable[..., Tensor]] = {name: _uniform(name) for name in _TERMS}


# --------------------------------------------------------------------------------------------------------------------
# From values per row to one loss
# --------------------------------------------------------------------------------------------------------------------


def reduce(values: Tensor, weights: Tensor | None, denominator: float | Tensor) -> Tensor:
    """sum_i w_i v_i / denominator: the one way from values per row to a loss.

    Args:
        values: [n], one per row.
        weights: [n] (a mask, or weights per row), or None for ones. A row of weight 0 counts for nothing, even if
            its value is not finite.
        denominator: > 0, the number (or weight) of supervised positions of the whole optimizer step. Every
            accumulated micro-batch passes the same number, and their backward passes add up; dividing again by the
            number of micro-batches would be a mistake.
    Returns: a scalar in the units of `values`.
    Raises: ValueError for shapes that differ, naming both, or a denominator that is not above 0.
    """
    if values.dim() != 1 or (weights is not None and weights.shape != values.shape):
        shown = "None" if weights is None else _shape(weights)
        raise ValueError(f"values [n] and weights [n] or None, not {_shape(values)} and {shown}")
    if not bool(torch.as_tensor(denominator) > 0):
        raise ValueError(f"denominator must be above 0, not {denominator}: no position of this step is supervised")
    if weights is not None:
        values = values.masked_fill(weights == 0, 0) * weights
    return values.sum() / denominator


def mixed(
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
    unknown = [term for term in loss if term != "ce" and term not in _TERMS]
    if unknown or not loss:
        wrong = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"unknown loss term {wrong}; known: ce, {', '.join(_TERMS)}")
    if "ce" in loss and targets is None:
        raise ValueError("loss term 'ce' needs targets")
    divergences = [term for term in loss if term != "ce"]
    if divergences and teacher_logprobs is None:
        raise ValueError(f"loss term {divergences[0]!r} needs teacher_logprobs")
    if mask is not None:
        if mask.dim() != 1 or len(mask) != len(student_logits):
            raise ValueError(f"mask must be [n]: student_logits {_shape(student_logits)}, mask {_shape(mask)}")
        for name, rows in (("targets", targets), ("teacher_logprobs", teacher_logprobs)):
            if rows is not None and len(rows) != len(mask):
                raise ValueError(f"{name} {_shape(rows)} must have the rows of student_logits {_shape(student_logits)}")
        keep = mask != 0
        if not bool(keep.all()):
            student_logits, mask = student_logits[keep], mask[keep]
            targets = None if targets is None else targets[keep]
            teacher_logprobs = None if teacher_logprobs is None else teacher_logprobs[keep]
    rows = _tempered(student_logits, teacher_logprobs, temperature) if divergences else None
    total, values = 0.0, {}
    for term, weight in loss.items():
        row_values = cross_entropy(student_logits, targets) if term == "ce" else _TERMS[term](rows, beta, alpha)
        value = reduce(row_values, mask, denominator)
        if scale_by_t2:
            value = value * temperature_factor(term, temperature)
        total = total + weight * value
        values[term] = value.detach()
    return total, values


# --------------------------------------------------------------------------------------------------------------------
# Several teachers
# --------------------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"logprobs [t, n, K] and weights [t] or [t, n], not {_shape(logprobs)} and {_shape(weights)}")
    work = _working(logprobs)
    weights = weights.to(work.dtype)
    if bool((weights < 0).any()) or not bool((weights.sum(0) > 0).all()):
        raise ValueError("weights must not be negative and must have a positive sum")
    weights = (weights / weights.sum(0)).reshape(len(work), -1, 1)
    return torch.logsumexp(work.log_softmax(-1) + weights.log(), 0)


def confidence_weights(logprobs: Tensor, targets: Tensor | None = None) -> Tensor:
    """Weight of each of t teachers per example, w_k = (1 - softmax_k(u)) / (t - 1), u_k the teacher's uncertainty.

    u_k is the teacher's cross-entropy with the gold label, as in the paper; where there is no gold label it is the
    entropy of the teacher's own distribution, its expected cross-entropy if it is calibrated.

    Args:
        logprobs: [t, n, K] log-probabilities at T = 1.
        targets: [n] int64 gold classes, with -100 (no label) falling back on entropy row by row; or None.
    Returns: [t, n], not negative, sums to 1 over the teachers; ones for a single teacher.
    Space: labels or vocabulary.
    Raises: ValueError for shapes that do not fit, naming both, or for classes outside 0..K-1.
    Source: Zhang, Chen & Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation" (CA-MKD), eq. 1-2.
    """
    if logprobs.dim() != 3 or (targets is not None and targets.shape != logprobs.shape[1:2]):
        shown = "None" if targets is None else _shape(targets)
        raise ValueError(f"logprobs [t, n, K] and targets [n] or None, not {_shape(logprobs)} and {shown}")
    log_p = _working(logprobs).log_softmax(-1)
    uncertainty = -(log_p.exp() * log_p.clamp_min(LOG_FLOOR)).sum(-1)
    if targets is not None:
        gold = torch.stack([cross_entropy(teacher.clamp_min(LOG_FLOOR), targets) for teacher in log_p])
        uncertainty = torch.where(targets == IGNORE, uncertainty, gold)
    if len(log_p) == 1:
        return torch.ones_like(uncertainty)
    return (1 - uncertainty.softmax(0)) / (len(log_p) - 1)


# --------------------------------------------------------------------------------------------------------------------
# Representations
# --------------------------------------------------------------------------------------------------------------------


def hidden_mse(student: Tensor, teacher: Tensor, projection: nn.Linear | None = None) -> Tensor:
    """Mean squared error of hidden states, 1/d_t ||W h_s - h_t||^2.

    Args:
        student: [n, d_s]; teacher: [n, d_t]. One row is one position, or one pooled or [CLS] state where the two
            models' tokenizers differ.
        projection: learned W from d_s to d_t; None only where d_s == d_t.
    Returns: [n], in squared units of the teacher's states, in [0, inf). Denominator: d_t within a row, none over rows.
    Space: hidden states.
    Raises: ValueError for shapes that do not fit, naming both.
    Source: Jiao et al. 2020, "TinyBERT", eq. 8; Romero et al. 2015, "FitNets", eq. 3.
    """
    mapped = student if projection is None else projection(student)
    if student.dim() != 2 or mapped.shape != teacher.shape:
        hint = " (pass a projection)" if projection is None else f" ({_shape(mapped)} after projection)"
        raise ValueError(f"student [n, d_s]{hint} and teacher [n, d_t], not {_shape(student)} and {_shape(teacher)}")
    mapped = _working(mapped)
    return (mapped - teacher.to(mapped.dtype)).square().mean(-1)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Patient distillation: sum over layers j of || h_s_j / ||h_s_j|| - h_t_j / ||h_t_j|| ||^2, h the [CLS] state.

    Args:
        student, teacher: [n, m, d], the [CLS] states of m layers, paired by :func:`layer_map`; equal widths.
    Returns: [n], dimensionless, in [0, 4 m]. Denominator: none (the paper sums over layers and rows).
    Space: hidden states.
    Raises: ValueError for shapes other than two equal [n, m, d], naming both.
    Source: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", eq. 7 (weight beta: eq. 8).
    """
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must be two equal [n, m, d], not {_shape(student)} and {_shape(teacher)}"
        )
    student = _working(student)
    teacher = teacher.to(student.dtype)
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum((-1, -2))


def layer_map(
    n_student: int, n_teacher: int, rule: str | Sequence[int | tuple[int, int]] = "skip"
) -> list[tuple[int, int]]:
    """Which teacher layer each student layer learns from: pairs (student layer, teacher layer), counted from 1.

    Layer j's output is `hidden_states[j]` of transformers, 0 being the embeddings. The last layers are left out by
    both rules: they are held together by the loss on the predictions.

    Args:
        n_student, n_teacher: how many layers each model has; n_student <= n_teacher for the two rules.
        rule: "skip" (12 -> 6 layers: 2, 4, 6, 8, 10), "last" (7, 8, 9, 10, 11), or a list: of teacher layers for the
            student's layers 1, 2, ..., or of pairs.
    Raises: ValueError for an unknown rule, a layer that does not exist, or a student deeper than its teacher.
    Source: Sun et al. 2019, section 3.2 (PKD-Skip, PKD-Last).
    """
    if isinstance(rule, str):
        if rule not in ("skip", "last"):
            raise ValueError(f"rule must be 'skip', 'last' or a list of layers, not {rule!r}")
        if n_student > n_teacher:
            raise ValueError(
                f"rule {rule!r} needs a teacher at least as deep: student {n_student}, teacher {n_teacher}"
            )
        if rule == "skip":
            return [(j, j * n_teacher // n_student) for j in range(1, n_student)]
        return [(j, n_teacher - n_student + j) for j in range(1, n_student)]
    pairs = [(j, entry) if isinstance(entry, int) else tuple(entry) for j, entry in enumerate(rule, 1)]
    for j, t in pairs:
        if not (0 <= j <= n_student and 0 <= t <= n_teacher):
            raise ValueError(f"layer pair ({j}, {t}) outside student 0..{n_student}, teacher 0..{n_teacher}")
    return pairs


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention transfer: 1/2 sum over layers of || Q_s / ||Q_s|| - Q_t / ||Q_t|| ||, Q_i = sum_c A_ic^2.

    A layer's activations [L, d] are summed over channels into a map of where it is active, so widths may differ.

    Args:
        student: [n, m, L, d_s], teacher: [n, m, L, d_t]: m paired layers, L positions of the same tokens.
        mask: [n, L], 0 for padding; None for all ones.
    Returns: [n], dimensionless, in [0, m / sqrt(2)]. Denominator: none (the paper sums over layers).
    Space: hidden states.
    Raises: ValueError for shapes that do not fit, naming both.
    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", eq. 2 with p = 2 (their weight is beta;
        their code squares the norm and takes its mean, the equation does not).
    """
    if student.dim() != 4 or student.shape[:3] != teacher.shape[:3]:
        raise ValueError(f"student [n, m, L, d_s], teacher [n, m, L, d_t], not {_shape(student)} and {_shape(teacher)}")
    if mask is not None and mask.shape != (len(student), student.shape[2]):
        raise ValueError(f"mask must be [n, L]: student {_shape(student)}, mask {_shape(mask)}")
    student = _working(student)
    maps = [states.to(student.dtype).square().sum(-1) for states in (student, teacher)]
    if mask is not None:
        maps = [m.masked_fill(mask[:, None, :] == 0, 0) for m in maps]
    return attention_transfer_maps(*maps)


def attention_transfer_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """:func:`attention_transfer` of maps that are already summed over channels, which are all that need be kept.

    Args: student, teacher: [n, m, L], Q of m paired layers, 0 at padding.
    Returns: [n], in [0, m / sqrt(2)]. Raises: ValueError for shapes other than two equal [n, m, L], naming both.
    """
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(f"student, teacher: two equal [n, m, L], not {_shape(student)} and {_shape(teacher)}")
    ours, theirs = (F.normalize(m, dim=-1) for m in (student, teacher.to(student.dtype)))
    return torch.linalg.vector_norm(ours - theirs, dim=-1).sum(-1) / 2


def cosine_embedding(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(h_s, h_t): only the direction of the hidden states counts.

    Args: student, teacher: [n, d], one row per position (padding left out) or pooled state.
    Returns: [n], dimensionless, in [0, 2]. Denominator: none, one value per row.
    Space: hidden states.
    Raises: ValueError for shapes other than two equal [n, d], naming both.
    Source: Sanh et al. 2019, "DistilBERT", section 3 (L_cos).
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(f"student and teacher must be two equal [n, d], not {_shape(student)} and {_shape(teacher)}")
    student = _working(student)
    return 1 - F.cosine_similarity(student, teacher.to(student.dtype), dim=-1)


# --------------------------------------------------------------------------------------------------------------------
# Other tokenizers, other objectives
# --------------------------------------------------------------------------------------------------------------------


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
            f"not {_shape(student_logits)} and {_shape(teacher_logprobs)}"
        )
    logits = _working(student_logits)
    ours = logits.softmax(-1).sort(-1, descending=True).values
    theirs = teacher_logprobs.to(logits.dtype).softmax(-1).sort(-1, descending=True).values
    width = max(ours.shape[1], theirs.shape[1])
    return (F.pad(ours, (0, width - ours.shape[1])) - F.pad(theirs, (0, width - theirs.shape[1]))).abs().sum(-1)


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
        raise ValueError(f"student_logits [n > 0, K] and prior [K], not {_shape(student_logits)} and {_shape(prior)}")
    if bool((prior < 0).any()) or not bool(prior.sum() > 0):
        raise ValueError("prior must not be negative and must have a positive sum")
    logits = _working(student_logits)
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
        raise ValueError(f"two scalars, not {_shape(label_loss)} and {_shape(rationale_loss)}")
    if not weight >= 0:
        raise ValueError(f"weight must not be negative, not {weight}")
    return label_loss + weight * rationale_loss


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
            f"not {_shape(student_logits)} and {_shape(teacher_logprobs)}"
        )
    ours, theirs = student_logits.shape[1], teacher_logprobs.shape[1]
    if ours == theirs:
        return student_logits, teacher_logprobs
    small, large = sorted((ours, theirs))
    if large - small >= PADDING or 10 * (large - small) > large or large % 64:
        raise ValueError(
            f"vocabularies of {ours} (student) and {theirs} (teacher) tokens differ by more than padding: they may "
            f"differ by less than {PADDING} and a tenth, the larger being a multiple of 64; "
            f"for another tokenizer use universal_logit_distance"
        )
    return student_logits[:, :small], _working(teacher_logprobs[:, :small]).log_softmax(-1)


# --------------------------------------------------------------------------------------------------------------------
# Teachers stored as their top k tokens
# --------------------------------------------------------------------------------------------------------------------


def to_top_k(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A distribution as its k likeliest outcomes and the mass of all others in one bucket.

    Args: logprobs: [n, K], log-probabilities at T = 1; 1 <= k <= K.
    Returns: (values [n, k], indices [n, k] int64, log_tail [n]); log_tail is -inf where nothing is left.
    Space: vocabulary.
    Raises: ValueError for other than [n, K], or k outside 1..K.
    """
    if logprobs.dim() != 2 or not 1 <= k <= logprobs.shape[1]:
        raise ValueError(f"logprobs [n, K] with 1 <= k <= K, not {_shape(logprobs)} with k = {k}")
    log_p = _working(logprobs).log_softmax(-1)
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
            f"student_logits [n, K], values and indices [n, k], log_tail [n], not {_shape(student_logits)}, "
            f"{_shape(values)}, {_shape(indices)}, {_shape(log_tail)}"
        )
    if values.dim() != 2 or len(values) != len(student_logits) or values.shape[1] > student_logits.shape[1]:
        raise ValueError(f"student_logits [n, K] and values [n, k], not {_shape(student_logits)} and {_shape(values)}")
    log_s = (_working(student_logits) / temperature).log_softmax(-1)
    log_s = torch.cat([log_s.gather(1, indices), _tail(log_s, indices)[:, None]], 1)
    log_p = (torch.cat([values, log_tail[:, None]], 1).to(log_s.dtype) / temperature).log_softmax(-1)
    # Both tails are empty when k == K: the floor keeps 0 x (-inf - -inf) from being NaN.
    return (log_p.exp() * (log_p.clamp_min(LOG_FLOOR) - log_s.clamp_min(torch.finfo(log_s.dtype).min))).sum(-1)


def _tail(log_p: Tensor, indices: Tensor) -> Tensor:
    # Summed over the others, not 1 - top: that cancels to nothing (and an infinite gradient) where the top holds all.
    if indices.shape[1] == log_p.shape[1]:
        return log_p.new_full((len(log_p),), -torch.inf)
    return log_p.scatter(1, indices, -torch.inf).logsumexp(-1)


def _working(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
