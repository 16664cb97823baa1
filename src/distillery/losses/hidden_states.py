"""Losses that compare hidden states: MSE, PKD, attention transfer, cosine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillery.losses.tensors import as_float, shape_text


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
        hint = " (pass a projection)" if projection is None else f" ({shape_text(mapped)} after projection)"
        raise ValueError(
            f"student [n, d_s]{hint} and teacher [n, d_t], not {shape_text(student)} and {shape_text(teacher)}"
        )
    mapped = as_float(mapped)
    return (mapped - teacher.to(mapped.dtype)).square().mean(-1)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """Patient distillation: sum over layers j of || h_s_j / ||h_s_j|| - h_t_j / ||h_t_j|| ||^2, h the [CLS] state.

    Args:
        student, teacher: [n, m, d], the [CLS] states of m layers, paired by :func:`pair_layers`; equal widths.
    Returns: [n], dimensionless, in [0, 4 m]. Denominator: none (the paper sums over layers and rows).
    Space: hidden states.
    Raises: ValueError for shapes other than two equal [n, m, d], naming both.
    Source: Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", eq. 7 (weight beta: eq. 8).
    """
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must be two equal [n, m, d], not {shape_text(student)} and {shape_text(teacher)}"
        )
    student = as_float(student)
    teacher = teacher.to(student.dtype)
    return (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum((-1, -2))


def pair_layers(
    n_student: int, n_teacher: int, rule: str | Sequence[int | tuple[int, int]] = "skip"
) -> list[tuple[int, int]]:
    """Which teacher layer each student layer learns from: pairs (student layer, teacher layer), counted from 1.

    The output of layer j is `hidden_states[j]` of transformers, 0 being the embeddings. Both rules leave out the last
    layers, which the loss on the predictions already compares.

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


def attention_transfer_maps(student: Tensor, teacher: Tensor) -> Tensor:
    """Attention transfer: 1/2 sum over layers of || Q_s / ||Q_s|| - Q_t / ||Q_t|| ||, Q_i = sum_c A_ic^2.

    Q, the map of where a layer is active, is the sum of squares of its activations A [L, d] over the channels. So the
    widths of the two models may differ.

    Args: student, teacher: [n, m, L], Q of m paired layers at L positions of the same tokens, 0 at padding.
    Returns: [n], dimensionless, in [0, m / sqrt(2)]. Denominator: none (the paper sums over layers).
    Space: hidden states.
    Raises: ValueError for shapes other than two equal [n, m, L], naming both.
    Source: Zagoruyko & Komodakis 2017, "Paying More Attention to Attention", eq. 2 with p = 2. Their weight is beta.
        Their code takes the mean of the squared norm, the equation does not.
    """
    if student.dim() != 3 or student.shape != teacher.shape:
        raise ValueError(f"student, teacher: two equal [n, m, L], not {shape_text(student)} and {shape_text(teacher)}")
    student = as_float(student)
    difference = F.normalize(student, dim=-1) - F.normalize(teacher.to(student.dtype), dim=-1)
    return torch.linalg.vector_norm(difference, dim=-1).sum(-1) / 2


def cosine_embedding(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cos(h_s, h_t): only the direction of the hidden states counts.

    Args: student, teacher: [n, d], one row per position (padding left out) or pooled state.
    Returns: [n], dimensionless, in [0, 2]. Denominator: none, one value per row.
    Space: hidden states.
    Raises: ValueError for shapes other than two equal [n, d], naming both.
    Source: Sanh et al. 2019, "DistilBERT", section 3 (L_cos).
    """
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher must be two equal [n, d], not {shape_text(student)} and {shape_text(teacher)}"
        )
    student = as_float(student)
    return 1 - F.cosine_similarity(student, teacher.to(student.dtype), dim=-1)
