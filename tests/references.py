"""Independent references for the loss terms, shared by the tests and by `benchmarks/loss_table.py`.

Each follows the paper's formula with NumPy and SciPy, or is TRL's own function where that is right; none shares
code with `distillery.losses`. Inputs are float64 NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial.distance import cosine, jensenshannon
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy, wasserstein_distance
from trl.experimental.gkd import GKDTrainer

from distillery import losses

Array = np.ndarray


@dataclass
class Rows:
    """One random case: n positions with K outcomes, and the settings of every term."""

    student: Array  # [n, K] logits
    teacher: Array  # [n, K] log-probabilities at T = 1, some -inf for zeros
    temperature: float
    beta: float
    alpha: float

    @property
    def s(self) -> Array:
        return softmax(self.student / self.temperature, -1)

    @property
    def p(self) -> Array:
        return softmax(self.teacher / self.temperature, -1)


def rows(rng: np.random.Generator, zeros: bool = False) -> Rows:
    """Random logits from nearly flat to nearly one-hot, over 2 to 60 outcomes."""
    n, k = rng.integers(1, 6), rng.integers(2, 61)
    scale = rng.choice([0.1, 1.0, 5.0])
    teacher = rng.normal(size=(n, k)) * scale
    if zeros:
        teacher[np.arange(n), rng.integers(0, k, n)] = -np.inf
    return Rows(
        rng.normal(size=(n, k)) * scale,
        log_softmax(teacher, -1),
        float(rng.choice([0.5, 1.0, 2.0, 5.0])),
        float(rng.uniform(0.05, 0.95)),
        float(rng.uniform(0.01, 0.9)),
    )


def trl_jsd(student: Array, teacher: Array, beta: float, temperature: float) -> Array:
    """TRL's static loss per row, [n]. Right for beta strictly between 0 and 1."""
    loss = GKDTrainer.generalized_jsd_loss(
        torch.tensor(student)[None], torch.tensor(teacher)[None], None, beta, temperature, reduction="none"
    )
    return loss[0].sum(-1).numpy()


def at_map(states: Array) -> Array:
    """Attention map of [L, d] activations, unit length."""
    flat = np.array([sum(x**2 for x in position) for position in states])
    return flat / np.sqrt((flat**2).sum())


def merged(probabilities: Array, kept: Array) -> Array:
    """A distribution [K] with everything outside `kept` as one last outcome."""
    return np.append(probabilities[kept], np.delete(probabilities, kept).sum())


@dataclass
class Check:
    """A term, its reference, and a function that compares both on one random case: -> (value, reference), one shape."""

    term: str
    formula: str
    space: str
    source: str
    reference: str
    compare: Callable[[np.random.Generator, torch.dtype], tuple[Array, Array]]


def _tensor(array: Array, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(array, dtype=dtype)


def divergence(term: str, student_logits, teacher_logprobs, *, temperature=1.0, beta=0.5, alpha=0.1) -> torch.Tensor:
    """The divergence `term` with those of the settings that it takes, [n]."""
    settings = {"jsd": {"beta": beta}, "skew_kl": {"alpha": alpha}, "skew_reverse_kl": {"alpha": alpha}}
    return losses.DISTRIBUTION_TERMS[term](student_logits, teacher_logprobs, temperature, **settings.get(term, {}))


def _divergence(term: str, reference: Callable[[Rows], Array], zeros: bool = True):
    def compare(rng, dtype):
        case = rows(rng, zeros and bool(rng.integers(2)))
        settings = {"temperature": case.temperature, "beta": case.beta, "alpha": case.alpha}
        value = divergence(term, _tensor(case.student, dtype), _tensor(case.teacher, dtype), **settings)
        return value.numpy(), reference(case)

    return compare


def _jsd_half(rng, dtype):
    case = rows(rng, bool(rng.integers(2)))
    value = losses.jsd(_tensor(case.student, dtype), _tensor(case.teacher, dtype), case.temperature, 0.5)
    return value.numpy(), jensenshannon(case.p, case.s, axis=-1) ** 2


def _jsd_scaled(rng, dtype):
    # The f-divergence written out, without a mixture of logarithms: another road to the same number.
    case = rows(rng)
    value = losses.jsd(
        _tensor(case.student, dtype), _tensor(case.teacher, dtype), case.temperature, case.beta, scaled=True
    )
    m = case.beta * case.p + (1 - case.beta) * case.s
    expected = entropy(m, axis=-1) - case.beta * entropy(case.p, axis=-1) - (1 - case.beta) * entropy(case.s, axis=-1)
    return value.numpy(), expected / (case.beta * (1 - case.beta))


def _cross_entropy(rng, dtype):
    case = rows(rng)
    targets = rng.integers(0, case.student.shape[1], len(case.student))
    value = losses.cross_entropy(_tensor(case.student, dtype), torch.tensor(targets))
    return value.numpy(), -log_softmax(case.student, -1)[np.arange(len(targets)), targets]


def _soft_cross_entropy(rng, dtype):
    case = rows(rng)
    value = losses.cross_entropy(_tensor(case.student, dtype), _tensor(case.p, dtype))
    s = softmax(case.student, -1)
    return value.numpy(), entropy(case.p, axis=-1) + rel_entr(case.p, s).sum(-1)


def _hidden_mse(rng, dtype):
    n, d_s, d_t = rng.integers(1, 9, 3)
    student, teacher = rng.normal(size=(n, d_s)), rng.normal(size=(n, d_t))
    projection = torch.nn.Linear(d_s, d_t, dtype=dtype)
    weight, bias = (t.detach().double().numpy() for t in (projection.weight, projection.bias))
    value = losses.hidden_mse(_tensor(student, dtype), _tensor(teacher, dtype), projection)
    expected = [
        np.mean([(weight[j] @ h + bias[j] - t[j]) ** 2 for j in range(d_t)])
        for h, t in zip(student, teacher, strict=True)
    ]
    return value.detach().numpy(), np.array(expected)


def _pkd(rng, dtype):
    n, m, d = rng.integers(2, 9, 3)
    student, teacher = rng.normal(size=(n, m, d)), rng.normal(size=(n, m, d))
    value = losses.pkd(_tensor(student, dtype), _tensor(teacher, dtype))
    return value.numpy(), np.array(
        [sum(2 * cosine(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(student, teacher, strict=True)]
    )


def _attention_transfer(rng, dtype):
    n, m, length, d_s, d_t = rng.integers(2, 7, 5)
    student, teacher = rng.normal(size=(n, m, length, d_s)), rng.normal(size=(n, m, length, d_t))
    lengths = rng.integers(1, length + 1, n)
    padding = torch.tensor(np.arange(length) >= lengths[:, None])[:, None]
    maps = [_tensor(states, dtype).square().sum(-1).masked_fill(padding, 0) for states in (student, teacher)]
    value = losses.attention_transfer_maps(*maps)
    expected = [
        sum(
            np.linalg.norm(at_map(a[: lengths[i]]) - at_map(b[: lengths[i]]))
            for a, b in zip(student[i], teacher[i], strict=True)
        )
        / 2
        for i in range(n)
    ]
    return value.numpy(), np.array(expected)


def _cosine(rng, dtype):
    n, d = rng.integers(2, 9, 2)
    student, teacher = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    value = losses.cosine_embedding(_tensor(student, dtype), _tensor(teacher, dtype))
    return value.numpy(), np.array([cosine(a, b) for a, b in zip(student, teacher, strict=True)])


def _uld(rng, dtype):
    case = rows(rng)
    teacher = log_softmax(rng.normal(size=(len(case.student), rng.integers(2, 61))) * 3, -1)
    value = losses.universal_logit_distance(_tensor(case.student, dtype), _tensor(teacher, dtype))
    s, p = softmax(case.student, -1), np.exp(teacher)
    width = max(s.shape[1], p.shape[1])
    s, p = (np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (s, p))
    return value.numpy(), np.array([width * wasserstein_distance(a, b) for a, b in zip(s, p, strict=True)])


def _shortcut(rng, dtype):
    case = rows(rng)
    prior = rng.dirichlet(np.ones(case.student.shape[1]))
    value = losses.shortcut_penalty(_tensor(case.student, dtype), _tensor(prior, dtype))
    return value.numpy(), entropy(softmax(case.student, -1).mean(0), prior)


def _mix(rng, dtype):
    t, n, k = rng.integers(1, 6, 3) + 1
    p = rng.dirichlet(np.ones(k), (t, n))
    weights = rng.uniform(0.1, 1, (t, n))
    value = losses.mix_teachers(_tensor(np.log(p), dtype), _tensor(weights, dtype))
    mean = np.stack([np.average(p[:, i], axis=0, weights=weights[:, i]) for i in range(n)])
    return value.numpy(), np.log(mean)


def _confidence(rng, dtype):
    t, n, k = rng.integers(2, 6, 3)
    p = rng.dirichlet(np.ones(k), (t, n))
    targets = rng.integers(0, k, n)
    gold = bool(rng.integers(2))
    value = losses.confidence_weights(_tensor(np.log(p), dtype), torch.tensor(targets) if gold else None)
    u = -np.log(p[:, np.arange(n), targets]) if gold else entropy(p, axis=-1)
    return value.numpy(), (1 - np.exp(u) / np.exp(u).sum(0)) / (t - 1)


def _top_k(rng, dtype):
    case = rows(rng)
    k = int(rng.integers(1, case.student.shape[1]))
    kept = losses.to_top_k(_tensor(case.teacher, dtype), k)
    value = losses.kl_top_k(_tensor(case.student, dtype), *kept)
    p, s = np.exp(case.teacher), softmax(case.student, -1)
    order = np.argsort(-p, -1)[:, :k]
    return value.numpy(), np.array(
        [rel_entr(merged(a, i), merged(b, i)).sum() for a, b, i in zip(p, s, order, strict=True)]
    )


def _shared(rng, dtype):
    n, small = int(rng.integers(1, 4)), 64 * int(rng.integers(12, 20))
    teacher = log_softmax(rng.normal(size=(n, small + 64)), -1)
    student, value = losses.shared_vocabulary(torch.zeros(n, small), _tensor(teacher, dtype))
    p = np.exp(teacher[:, :small])
    return value.numpy(), np.log(p / p.sum(-1, keepdims=True))


BOTH = "labels or vocabulary"
CHECKS = [
    Check("cross_entropy, classes", "-log s_y", BOTH, "", "scipy.special.log_softmax", _cross_entropy),
    Check("cross_entropy, soft", "-Σ y log s", BOTH, "", "scipy: entropy(y) + Σ rel_entr(y, s)", _soft_cross_entropy),
    Check(
        "kl",
        "Σ p log(p/s)",
        BOTH,
        "Hinton et al. 2015, §2",
        "scipy.special.rel_entr(p, s)",
        _divergence("kl", lambda c: rel_entr(c.p, c.s).sum(-1)),
    ),
    Check(
        "reverse_kl",
        "Σ s log(s/p)",
        BOTH,
        "Gu et al. 2024, eq. 1",
        "scipy.special.rel_entr(s, p)",
        _divergence("reverse_kl", lambda c: rel_entr(c.s, c.p).sum(-1), zeros=False),
    ),
    Check(
        "jsd, any β",
        "β KL(p‖m) + (1-β) KL(s‖m), m = βp + (1-β)s",
        BOTH,
        "Agarwal et al. 2024, eq. 1",
        "TRL generalized_jsd_loss",
        _divergence("jsd", lambda c: trl_jsd(c.student, c.teacher, c.beta, c.temperature), zeros=False),
    ),
    Check("jsd, β = 0.5", "as above", BOTH, "as above", "scipy jensenshannon²", _jsd_half),
    Check("jsd, scaled", "jsd / (β(1-β))", BOTH, "as above", "scipy.stats.entropy of m, p and s", _jsd_scaled),
    Check(
        "skew_kl",
        "KL(p ‖ αp + (1-α)s)",
        BOTH,
        "Ko et al. 2024, §3.1",
        "scipy.special.rel_entr",
        _divergence("skew_kl", lambda c: rel_entr(c.p, c.alpha * c.p + (1 - c.alpha) * c.s).sum(-1)),
    ),
    Check(
        "skew_reverse_kl",
        "KL(s ‖ (1-α)p + αs)",
        BOTH,
        "Ko et al. 2024, §3.1",
        "scipy.special.rel_entr",
        _divergence("skew_reverse_kl", lambda c: rel_entr(c.s, (1 - c.alpha) * c.p + c.alpha * c.s).sum(-1)),
    ),
    Check(
        "tvd",
        "½ Σ |p - s|",
        BOTH,
        "Wen et al. 2023",
        "NumPy: 1 - Σ min(p, s)",
        _divergence("tvd", lambda c: 1 - np.minimum(c.p, c.s).sum(-1)),
    ),
    Check("mix_teachers", "log Σ w p / Σ w", BOTH, "Hinton et al. 2015, §3", "numpy.average", _mix),
    Check(
        "confidence_weights",
        "(1 - softmax(u)) / (t-1), u = CE with gold, or entropy",
        BOTH,
        "Zhang et al. 2022, eq. 1-2",
        "NumPy, the paper's ratio of exponentials",
        _confidence,
    ),
    Check("hidden_mse", "‖W h_s - h_t‖² / d", "hidden states", "Jiao et al. 2020, eq. 8", "NumPy loop", _hidden_mse),
    Check(
        "pkd",
        "Σ_j ‖ĥ_s - ĥ_t‖², ĥ = h/‖h‖",
        "hidden states",
        "Sun et al. 2019, eq. 7",
        "2 Σ_j scipy cosine distance",
        _pkd,
    ),
    Check(
        "attention_transfer_maps",
        "½ Σ_j ‖Q̂_s - Q̂_t‖, Q = Σ_c A_c²",
        "hidden states",
        "Zagoruyko & Komodakis 2017, eq. 2",
        "NumPy loop, padding cut off",
        _attention_transfer,
    ),
    Check("cosine_embedding", "1 - cos(h_s, h_t)", "hidden states", "Sanh et al. 2019, §3", "scipy cosine", _cosine),
    Check(
        "universal_logit_distance",
        "Σ_i |s_(i) - p_(i)|, sorted",
        "vocabulary (two)",
        "Boizard et al. 2024",
        "K × scipy wasserstein_distance",
        _uld,
    ),
    Check("shortcut_penalty", "KL(mean s ‖ prior)", "labels", "", "scipy.stats.entropy(mean, prior)", _shortcut),
    Check("shared_vocabulary", "log p_i / Σ_shared p", "vocabulary", "", "NumPy slice and sum", _shared),
    Check("kl_top_k", "KL over k tokens and one tail", "vocabulary", "", "scipy rel_entr of merged outcomes", _top_k),
]


def largest_error(check: Check, cases: int = 200, dtype: torch.dtype = torch.float64, seed: int = 0) -> float:
    """The largest |value - reference| / max(1, |reference|) over random cases."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    worst = 0.0
    for _ in range(cases):
        value, reference = check.compare(rng, dtype)
        assert value.shape == reference.shape, (check.term, value.shape, reference.shape)
        worst = max(worst, float(np.max(np.abs(value - reference) / np.maximum(1, np.abs(reference)))))
    return worst
