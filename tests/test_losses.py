"""The loss terms: against independent references, by property, and at the edges of float."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distillery import losses
from distillery.config.schema import DIVERGENCES
from distillery.losses.tensors import any_true
from references import CHECKS, divergence, largest_error

NAMES = list(losses.DISTRIBUTION_TERMS)
seeds = st.integers(0, 2**31)
by_term = pytest.mark.parametrize("name", NAMES)


def pair(seed: int = 0, n: int = 4, k: int = 7, scale: float = 2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, n, k, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return student, teacher.log_softmax(-1)


def log(probabilities):
    return torch.tensor(probabilities, dtype=torch.float64).log()


# ---------------------------------------------------------------------------------------------- values and references


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.term)
def test_agrees_with_an_independent_reference(check):
    assert largest_error(check, cases=40) < 1e-9
    assert largest_error(check, cases=20, dtype=torch.float32) < 2e-5


def test_the_terms_are_those_of_params():
    assert set(NAMES) == set(DIVERGENCES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # p = (1/2, 1/2), s = (1/4, 3/4); m = (3/8, 5/8) for jsd; alpha = 1/2 makes the skewed mixture the same m.
        ("kl", math.log(2 / math.sqrt(3))),
        ("reverse_kl", 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        ("jsd", 0.5 * 0.5 * math.log(16 / 15) + 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))),
        ("skew_kl", 0.5 * math.log(16 / 15)),
        ("skew_reverse_kl", 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
        ("tvd", 0.25),
    ],
)
def test_value_computed_by_hand(name, expected):
    value = divergence(name, log([[0.25, 0.75]]), log([[0.5, 0.5]]), alpha=0.5)
    assert value.tolist() == pytest.approx([expected], abs=1e-12)


def test_temperature_by_hand():
    # Logits (0, 2 ln 3) at T = 2 are (1/4, 3/4); the teacher's (1/10, 9/10) at T = 2 is (1/4, 3/4) too.
    student = torch.tensor([[0, 2 * math.log(3)]], dtype=torch.float64)
    assert losses.kl(student, log([[0.1, 0.9]]), 2.0).item() == pytest.approx(0, abs=1e-12)
    assert losses.kl(student, log([[0.1, 0.9]]), 1.0).item() == pytest.approx(0, abs=1e-12)
    assert losses.kl(student, log([[0.5, 0.5]]), 2.0).item() == pytest.approx(math.log(2 / math.sqrt(3)), abs=1e-12)


def test_cross_entropy_by_hand():
    logits = log([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])
    hard = losses.cross_entropy(logits, torch.tensor([0, 1, -100]))
    assert hard.tolist() == pytest.approx([math.log(4), math.log(2), 0.0])
    soft = losses.cross_entropy(logits[:1], torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    assert soft.tolist() == pytest.approx([0.5 * math.log(4) + 0.5 * math.log(4 / 3)])


def test_representation_terms_by_hand():
    one, other = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert losses.hidden_mse(one, other).tolist() == [1.0]
    assert losses.cosine_embedding(one, other).item() == pytest.approx(1 - 24 / 25)
    assert losses.pkd(one[:, None], other[:, None]).item() == pytest.approx(2 * (1 / 25))
    # Two positions with activations 1 and 0 against 0 and 1: maps (1, 0) and (0, 1), half of sqrt(2).
    maps = torch.tensor([[[1.0, 0.0]]])
    assert losses.attention_transfer_maps(maps, maps.flip(2)).item() == pytest.approx(math.sqrt(2) / 2)


def test_universal_logit_distance_by_hand():
    student = log([[0.25, 0.75]])
    assert losses.universal_logit_distance(student, log([[0.5, 0.3, 0.2]])).item() == pytest.approx(0.25 + 0.05 + 0.2)
    assert losses.universal_logit_distance(student, log([[0.75, 0.25]])).item() == pytest.approx(0)


def test_shortcut_penalty_sees_the_batch_and_not_the_row():
    one_sided = torch.tensor([[5.0, -5.0], [-5.0, 5.0]])
    prior = torch.tensor([0.5, 0.5])
    assert losses.shortcut_penalty(one_sided, prior).item() == pytest.approx(0, abs=1e-6)
    assert losses.shortcut_penalty(one_sided[:1], prior).item() == pytest.approx(math.log(2), abs=1e-3)
    assert losses.shortcut_penalty(one_sided, torch.tensor([1.0, 0.0])).isfinite()


def test_layer_map_as_in_the_paper():
    assert [t for _, t in losses.pair_layers(6, 12, "skip")] == [2, 4, 6, 8, 10]
    assert [t for _, t in losses.pair_layers(6, 12, "last")] == [7, 8, 9, 10, 11]
    assert [t for _, t in losses.pair_layers(3, 12, "skip")] == [4, 8]
    assert [t for _, t in losses.pair_layers(3, 12, "last")] == [10, 11]
    assert losses.pair_layers(3, 6, [2, 4, 6]) == [(1, 2), (2, 4), (3, 6)]
    assert losses.pair_layers(3, 6, [(0, 0), (3, 6)]) == [(0, 0), (3, 6)]


# ------------------------------------------------------------------------------------------------------- properties


@by_term
@settings(max_examples=25)
@given(
    seed=seeds,
    scale=st.sampled_from([1e-3, 1.0, 20.0]),
    temperature=st.floats(0.3, 10),
    beta=st.floats(0.01, 0.99),
    alpha=st.floats(0, 0.99),
)
def test_never_negative_and_zero_only_where_equal(name, seed, scale, temperature, beta, alpha):
    def term(s, p):
        return divergence(name, s, p, temperature=temperature, beta=beta, alpha=alpha)

    student, teacher = pair(seed, scale=scale, dtype=torch.float32)
    assert (term(student, teacher) >= -1e-6).all()
    student, teacher = pair(seed, scale=min(scale, 5))
    assert (term(student, teacher) > 0).all()
    assert term(teacher + 3, teacher).abs().max() < 1e-13


@by_term
@settings(max_examples=25)
@given(seed=seeds, shift=st.floats(-100, 100))
def test_shifted_logits_and_permuted_outcomes_change_nothing(name, seed, shift):
    student, teacher = pair(seed)
    value = divergence(name, student, teacher, temperature=2.0)
    torch.testing.assert_close(divergence(name, student + shift, teacher, temperature=2.0), value)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    permuted = divergence(name, student[:, order], teacher[:, order], temperature=2.0)
    torch.testing.assert_close(permuted, value)


@settings(max_examples=25)
@given(seed=seeds, beta=st.floats(0.01, 0.99))
def test_jsd_swaps_sides_with_beta_and_is_bounded(seed, beta):
    student, teacher = pair(seed, scale=5.0)
    forth = losses.jsd(student, teacher, beta=beta)
    torch.testing.assert_close(forth, losses.jsd(teacher, student.log_softmax(-1), beta=1 - beta))
    torch.testing.assert_close(
        losses.jsd(student, teacher, beta=0.5), losses.jsd(teacher, student.log_softmax(-1), beta=0.5)
    )
    assert (forth <= -beta * math.log(beta) - (1 - beta) * math.log(1 - beta) + 1e-12).all()


@settings(max_examples=25)
@given(seed=seeds, alpha=st.floats(0.01, 0.99))
def test_skewed_terms_and_tvd_are_bounded(seed, alpha):
    student, teacher = pair(seed, scale=50.0)
    teacher[:, 0] = -torch.inf
    for term in (losses.skew_kl, losses.skew_reverse_kl):
        assert (term(student, teacher, alpha=alpha) <= -math.log(alpha) + 1e-9).all()
    assert (losses.tvd(student, teacher) <= 1 + 1e-12).all()


def test_skewed_terms_begin_at_the_unskewed():
    student, teacher = pair()
    for skewed, plain in ((losses.skew_kl, losses.kl), (losses.skew_reverse_kl, losses.reverse_kl)):
        assert torch.equal(skewed(student, teacher, alpha=0.0), plain(student, teacher))
        torch.testing.assert_close(skewed(student, teacher, alpha=1e-9), plain(student, teacher), rtol=1e-5, atol=1e-7)


@by_term
def test_limits_of_temperature(name):
    # Hot: everything is uniform. Cold: each side is its likeliest outcome, so agreement on that is all that counts.
    student, teacher = pair(scale=1.0)
    assert (divergence(name, student, teacher, temperature=1e6) < 1e-5).all()
    agreeing = teacher * 3
    assert (divergence(name, agreeing, teacher, temperature=1e-3) < 1e-6).all()
    apart = (student.argmax(-1) != teacher.argmax(-1)).double()
    assert apart.any()
    torch.testing.assert_close(losses.tvd(student, teacher, 1e-3), apart)


@pytest.mark.parametrize("name", [*NAMES, "ce"])
def test_temperature_factor_keeps_the_size_of_the_gradient(name):
    student, teacher = pair(scale=1.0)
    sizes = []
    for temperature in (50.0, 100.0):
        logits = student.clone().requires_grad_()
        total, _ = losses.combine_terms(
            {name: 1.0},
            logits,
            targets=torch.tensor([0, 1, 2, 3]),
            teacher_logprobs=teacher,
            temperature=temperature,
            denominator=4,
        )
        total.backward()
        sizes.append(logits.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.03)


# --------------------------------------------------------------------------------------------------------- gradients


@by_term
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("zeros", [False, True])
def test_gradient(name, temperature, zeros):
    student, teacher = pair(n=3, k=5)
    if zeros:
        teacher[:, 1] = -torch.inf
    assert torch.autograd.gradcheck(
        lambda s: divergence(name, s, teacher, temperature=temperature, beta=0.3, alpha=0.2),
        student.requires_grad_(),
    )


def test_gradient_of_the_other_terms():
    student, teacher = pair(n=3, k=5)
    student.requires_grad_()
    targets = torch.tensor([0, -100, 4])
    kept = losses.to_top_k(teacher, 2)
    projection = nn.Linear(5, 5, dtype=torch.float64)
    hidden, other = torch.randn(2, 2, 3, 4, 5, dtype=torch.float64)
    hidden.requires_grad_()
    checks = [
        (lambda s: losses.cross_entropy(s, targets), student),
        (lambda s: losses.cross_entropy(s, teacher.exp()), student),
        (lambda s: losses.jsd(s, teacher, 2.0, 0.1, scaled=True), student),
        (lambda s: losses.kl_top_k(s, *kept), student),
        (lambda s: losses.universal_logit_distance(s, teacher[:, :3].log_softmax(-1)), student),
        (lambda s: losses.shortcut_penalty(s, torch.full((5,), 0.2, dtype=torch.float64)), student),
        (lambda s: losses.hidden_mse(s, teacher, projection), student),
        (lambda s: losses.cosine_embedding(s, teacher), student),
        (lambda h: losses.pkd(h[:, :, 0], other[:, :, 0]), hidden),
        (lambda h: losses.attention_transfer_maps(h[:, :, 0].square(), other[:, :, 0].square()), hidden),
    ]
    for function, argument in checks:
        assert torch.autograd.gradcheck(function, argument)


def test_gradient_of_kl_is_the_difference_of_probabilities():
    student, teacher = pair()
    student.requires_grad_()
    losses.kl(student, teacher, 2.0).sum().backward()
    expected = ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2
    torch.testing.assert_close(student.grad, expected.detach())


def test_agreement_has_a_finite_gradient():
    # A norm has no derivative at 0, where a student that is its teacher's copy begins.
    states = torch.randn(2, 3, 4, 5)
    student = states.clone().requires_grad_()
    maps = [hidden.square().sum(-1) for hidden in (student, states)]
    losses.attention_transfer_maps(*maps).sum().backward()
    assert student.grad.isfinite().all()


# ----------------------------------------------------------------------------------------- edges of float, zeros, masks


@by_term
@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float16, 65504.0), (torch.bfloat16, 1e30), (torch.float32, 1e30)]
)
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_finite_with_extreme_logits_in_half_precision(name, dtype, largest, temperature):
    student = torch.tensor([[largest, -largest, 0.0], [-largest, largest, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-torch.inf, 0.0, -torch.inf], [0.0, -1e4, -1e4], [-1.0, -1.0, -1.0]], dtype=dtype)
    student.requires_grad_()
    value = divergence(name, student, teacher, temperature=temperature)
    assert value.dtype == torch.float32 and value.isfinite().all() and (value >= -1e-6).all()
    value.sum().backward()
    assert student.grad.dtype == dtype and student.grad.isfinite().all()


@by_term
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_lose_nothing_more_in_the_loss(name, dtype):
    student, teacher = pair(dtype=dtype)
    value = divergence(name, student, teacher, temperature=2.0)
    exact = divergence(name, student.double(), teacher.double(), temperature=2.0)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


def test_zero_probabilities_weigh_nothing_and_cost_at_most_the_floor():
    student = log([[0.5, 0.25, 0.25]])
    teacher = log([[0.5, 0.5, 0.0]])
    assert losses.kl(student, teacher).item() == pytest.approx(0.5 * math.log(2))
    expected = 0.25 * math.log(0.5) + 0.25 * (math.log(0.25) - losses.LOG_FLOOR)
    assert losses.reverse_kl(student, teacher).item() == pytest.approx(expected)
    for name in NAMES:  # re-tempering leaves a zero a zero
        hot = divergence(name, student, teacher, temperature=5.0)
        assert hot.isfinite().all() and hot.item() > 1e-3


def test_masked_rows_may_hold_anything():
    student, teacher = pair(dtype=torch.float32)
    bad_student, bad_teacher = student.clone(), teacher.clone()
    bad_student[1], bad_teacher[1] = torch.nan, torch.nan
    bad_student.requires_grad_()
    arguments = {"targets": torch.tensor([0, 1, 2, 3]), "temperature": 2.0, "denominator": 3}
    mask = torch.tensor([True, False, True, True])
    loss = dict.fromkeys(("ce", *DIVERGENCES), 1.0)
    total, values = losses.combine_terms(loss, bad_student, teacher_logprobs=bad_teacher, mask=mask, **arguments)
    arguments["targets"] = arguments["targets"][mask]
    expected, parts = losses.combine_terms(loss, student[mask], teacher_logprobs=teacher[mask], **arguments)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(values, parts)
    total.backward()
    assert bad_student.grad.isfinite().all() and (bad_student.grad[1] == 0).all()


def test_a_micro_batch_without_a_supervised_row_adds_nothing():
    student, teacher = pair(dtype=torch.bfloat16)
    student.requires_grad_()
    total, values = losses.combine_terms(
        dict.fromkeys(("ce", *DIVERGENCES), 1.0),
        student,
        targets=torch.tensor([0, 1, 2, 3]),
        teacher_logprobs=teacher,
        denominator=5,
        mask=torch.zeros(4),
    )
    total.backward()
    assert total.item() == 0 and not any(values.values()) and (student.grad == 0).all()


def test_reduce_by_hand():
    values = torch.tensor([1.0, 2.0, torch.inf])
    assert losses.reduce(values[:2], None, 4).item() == 0.75
    assert losses.reduce(values, torch.tensor([1, 1, 0]), torch.tensor(2)).item() == 1.5
    assert losses.reduce(values, torch.tensor([0.5, 2.0, 0.0]), 1).item() == 4.5
    assert losses.reduce(values[:0], None, 3).item() == 0.0


@by_term
def test_a_term_of_a_sum_is_the_function_of_that_name(name):
    student, teacher = pair(dtype=torch.float32)
    settings = {"temperature": 2.0, "beta": 0.3, "alpha": 0.2}
    total, _ = losses.combine_terms(
        {name: 1.0}, student, teacher_logprobs=teacher, scale_by_t2=False, denominator=4, **settings
    )
    assert torch.equal(total, divergence(name, student, teacher, **settings).sum() / 4)


def test_mixed_is_the_weighted_sum_of_its_terms():
    student, teacher = pair()
    targets = torch.tensor([0, 1, 2, 3])
    weights = {"ce": 0.5, "kl": 0.3, "tvd": 2.0}
    total, values = losses.combine_terms(
        weights, student, targets=targets, teacher_logprobs=teacher, temperature=3.0, denominator=8
    )
    assert values["ce"].item() == pytest.approx(losses.cross_entropy(student, targets).sum().item() / 8)
    assert values["kl"].item() == pytest.approx(9 * losses.kl(student, teacher, 3.0).sum().item() / 8)
    assert values["tvd"].item() == pytest.approx(3 * losses.tvd(student, teacher, 3.0).sum().item() / 8)
    assert total.item() == pytest.approx(sum(weights[t] * values[t].item() for t in weights))
    _, plain = losses.combine_terms(
        {"kl": 1.0}, student, teacher_logprobs=teacher, temperature=3.0, scale_by_t2=False, denominator=8
    )
    assert plain["kl"].item() * 9 == pytest.approx(values["kl"].item())


@settings(max_examples=20)
@given(seed=seeds, cuts=st.lists(st.integers(1, 11), max_size=4, unique=True), masked=st.booleans())
def test_uneven_micro_batches_add_up_to_the_gradient_of_the_big_batch(seed, cuts, masked):
    torch.manual_seed(seed)
    model = nn.Linear(6, 5, dtype=torch.float64)
    inputs, teacher = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64).log_softmax(-1)
    targets = torch.randint(5, (12,))
    mask = torch.rand(12) < 0.6 if masked else torch.ones(12, dtype=torch.bool)
    mask[0] = True

    def gradient(edges):
        model.zero_grad()
        for start, stop in zip(edges, edges[1:], strict=False):
            part = slice(start, stop)
            total, _ = losses.combine_terms(
                {"ce": 0.5, "kl": 1.0, "jsd": 1.0},
                model(inputs[part]),
                targets=targets[part],
                teacher_logprobs=teacher[part],
                temperature=2.0,
                denominator=mask.sum(),
                mask=mask[part],
            )
            total.backward()
        return model.weight.grad.clone()

    torch.testing.assert_close(gradient([0, *sorted(cuts), 12]), gradient([0, 12]))


# ---------------------------------------------------------------------------------------------------- several teachers


def test_mix_of_teachers():
    student, one = pair()
    two = one.roll(1, -1)
    two[0, 0] = -torch.inf
    both = torch.stack([one, two])
    torch.testing.assert_close(losses.mix_teachers(both, torch.tensor([1.0, 0.0])), one)
    mean = losses.mix_teachers(both, torch.ones(2))
    torch.testing.assert_close(mean.exp(), (one.exp() + two.log_softmax(-1).exp()) / 2)
    torch.testing.assert_close(losses.mix_teachers(both, torch.tensor([3.0, 3.0])), mean)
    torch.testing.assert_close(losses.mix_teachers(both, torch.ones(2, 4)), mean)
    torch.testing.assert_close(mean.logsumexp(-1), torch.zeros(4, dtype=torch.float64))
    nowhere = torch.full((2, 1, 3), -torch.inf)
    nowhere[:, :, 0] = 0
    assert losses.mix_teachers(nowhere, torch.ones(2))[0].tolist() == [0, -math.inf, -math.inf]


def test_confidence_goes_to_the_teacher_that_is_right():
    sure, wrong, unsure = ([0.9, 0.1], [0.1, 0.9], [0.5, 0.5])
    teachers = log([[sure], [wrong], [unsure]])
    with_gold = losses.confidence_weights(teachers, torch.tensor([0])).squeeze(1)
    assert with_gold[0] > with_gold[2] > with_gold[1]
    # By hand, exp(cross-entropy) = 1/p: 10/9, 10 and 2.
    total = 10 / 9 + 10 + 2
    assert with_gold.tolist() == pytest.approx([(1 - u / total) / 2 for u in (10 / 9, 10, 2)])
    without = losses.confidence_weights(teachers).squeeze(1)
    assert without[0] == pytest.approx(without[1].item()) and without[0] > without[2]
    torch.testing.assert_close(losses.confidence_weights(teachers, torch.tensor([-100])).squeeze(1), without)
    assert losses.confidence_weights(teachers[:1]).tolist() == [[1.0]]
    certain = losses.confidence_weights(log([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([0]))
    assert certain.flatten().tolist() == pytest.approx([1.0, 0.0])


# --------------------------------------------------------------------------------------------- vocabularies and top k


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [(151_936, 152_064), (152_064, 151_936), (50_257, 50_304), (120, 128)]
)
def test_shared_vocabulary_cuts_padding(student_size, teacher_size):
    student, teacher = torch.randn(2, student_size), torch.randn(2, teacher_size).log_softmax(-1)
    cut, mass = losses.shared_vocabulary(student, teacher)
    assert cut.shape == mass.shape == (2, min(student_size, teacher_size))
    assert torch.equal(cut, student[:, : cut.shape[1]])
    torch.testing.assert_close(mass.exp().sum(-1), torch.ones(2))
    assert losses.kl(cut, mass).isfinite().all()


@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [(32_000, 32_768), (49_152, 50_257), (3, 4), (40, 64), (50_257, 50_300)]
)
def test_shared_vocabulary_refuses_another_tokenizer(student_size, teacher_size):
    with pytest.raises(ValueError, match=f"{student_size} .student. and {teacher_size} .teacher."):
        losses.shared_vocabulary(torch.randn(1, student_size), torch.randn(1, teacher_size).log_softmax(-1))


def test_top_k_of_everything_is_exact():
    student, teacher = pair()
    values, indices, tail = losses.to_top_k(teacher, 7)
    assert torch.isneginf(tail).all()
    torch.testing.assert_close(losses.kl_top_k(student, values, indices, tail), losses.kl(student, teacher))


@settings(max_examples=25)
@given(seed=seeds, k=st.integers(1, 49))
def test_top_k_is_a_lower_bound_that_grows_with_k(seed, k):
    student, teacher = pair(seed, k=50)
    full = losses.kl(student, teacher)
    part = losses.kl_top_k(student, *losses.to_top_k(teacher, k))
    more = losses.kl_top_k(student, *losses.to_top_k(teacher, k + 1))
    assert (part >= -1e-12).all() and (part <= more + 1e-12).all() and (more <= full + 1e-12).all()


@settings(max_examples=25)
@given(seed=seeds, k=st.integers(1, 50), share=st.floats(0.01, 0.99))
def test_every_divergence_on_top_k_is_a_lower_bound_and_exact_on_all_tokens(seed, k, share):
    student, teacher = pair(seed, k=50)
    settings = {"beta": share, "alpha": share, "denominator": 1.0}
    for term in losses.DISTRIBUTION_TERMS:
        for i in range(len(student)):
            row = slice(i, i + 1)
            kept = losses.merge_rest(student[row], *losses.to_top_k(teacher[row], k))
            whole, _ = losses.combine_terms({term: 1.0}, student[row], teacher_logprobs=teacher[row], **settings)
            part, _ = losses.combine_terms({term: 1.0}, kept[0], teacher_logprobs=kept[1], **settings)
            assert -1e-12 <= part <= whole + 1e-12, term
            if k == 50:
                assert part == pytest.approx(whole.item(), rel=1e-9, abs=1e-12), term


@settings(max_examples=10)
@given(seed=seeds)
def test_a_student_with_the_teachers_top_and_rest_has_no_gradient(seed):
    """All that top-k can teach is learned when the k + 1 outcomes agree, whatever the tail looks like."""
    _, teacher = pair(seed, k=50)
    values, indices, log_tail = losses.to_top_k(teacher, 5)
    student = torch.full_like(teacher, 0.0).scatter(1, indices, -torch.inf).log_softmax(-1) + log_tail[:, None]
    student = student.scatter(1, indices, values).requires_grad_()
    log_s, log_p = losses.merge_rest(student, values, indices, log_tail)
    for term in losses.DISTRIBUTION_TERMS:
        total, _ = losses.combine_terms({term: 1.0}, log_s, teacher_logprobs=log_p, denominator=1.0)
        (gradient,) = torch.autograd.grad(total, student, retain_graph=True)
        assert total.abs() < 1e-9, term
        assert term == "tvd" or gradient.abs().max() < 1e-9, term  # |x| has no gradient at 0


def test_top_k_tail_is_right_where_the_top_holds_nearly_all():
    # 1 - top would be 0 in float32, its logarithm -inf, and the student's gradient there infinite.
    teacher = torch.tensor([[30.0, 0.0, 0.0, 0.0]]).log_softmax(-1)
    _, _, tail = losses.to_top_k(teacher, 1)
    assert tail.item() == pytest.approx(math.log(3) - 30, abs=1e-4)
    student = torch.tensor([[40.0, 0.0, 0.0, 0.0]], requires_grad=True)
    losses.kl_top_k(student, *losses.to_top_k(teacher, 1)).sum().backward()
    assert student.grad.isfinite().all()


def test_the_error_of_top_k_grows_with_the_temperature():
    """Which is why a phase with `top_k` takes no other temperature than 1."""
    student, teacher = pair(k=2000)
    values, indices, tail = losses.to_top_k(teacher, 64)
    errors = []
    for temperature in (1.0, 2.0, 5.0):
        full = losses.kl(student, teacher, temperature)
        part = losses.kl_top_k(student / temperature, values / temperature, indices, tail / temperature)
        errors.append(((part - full).abs() / full).mean().item())
    assert errors[0] < errors[1] < errors[2] and errors[2] > 0.8


# ------------------------------------------------------------------------------------------------------------ refusals

A, B = torch.zeros(2, 3), torch.zeros(2, 4)
H = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        *[(lambda name=name: divergence(name, A, B), ("[2, 3]", "[2, 4]")) for name in NAMES],
        (lambda: losses.kl(H, H), ("[2, 3, 4]",)),
        (lambda: losses.cross_entropy(A, torch.zeros(3).long()), ("[2, 3]", "[3]")),
        (lambda: losses.cross_entropy(A, B), ("[2, 3]", "[2, 4]")),
        (lambda: losses.cross_entropy(A, torch.zeros(2)), ("[2, 3]", "[2]")),
        (lambda: losses.reduce(torch.ones(2), torch.ones(3), 1), ("[2]", "[3]")),
        (lambda: losses.combine_terms({"kl": 1.0}, A, teacher_logprobs=B, denominator=1), ("[2, 3]", "[2, 4]")),
        (
            lambda: losses.combine_terms({"kl": 1.0}, A, teacher_logprobs=A, denominator=1, mask=torch.ones(3)),
            ("[2, 3]", "[3]"),
        ),
        (
            lambda: losses.combine_terms({"kl": 1.0}, A, teacher_logprobs=A[:1], denominator=1, mask=torch.ones(2)),
            ("[2, 3]", "[1, 3]"),
        ),
        (lambda: losses.mix_teachers(H, torch.ones(3)), ("[2, 3, 4]", "[3]")),
        (lambda: losses.confidence_weights(H, torch.zeros(2).long()), ("[2, 3, 4]", "[2]")),
        (lambda: losses.hidden_mse(A, B), ("[2, 3]", "[2, 4]")),
        (lambda: losses.hidden_mse(A, B, nn.Linear(3, 5)), ("[2, 3]", "[2, 4]", "[2, 5]")),
        (lambda: losses.pkd(H, H[:, :2]), ("[2, 3, 4]", "[2, 2, 4]")),
        (lambda: losses.attention_transfer_maps(H, H[:, :2]), ("[2, 3, 4]", "[2, 2, 4]")),
        (lambda: losses.cosine_embedding(A, B), ("[2, 3]", "[2, 4]")),
        (lambda: losses.universal_logit_distance(A, B[:1]), ("[2, 3]", "[1, 4]")),
        (lambda: losses.shortcut_penalty(A, torch.ones(4)), ("[2, 3]", "[4]")),
        (lambda: losses.shared_vocabulary(A, B[:1]), ("[2, 3]", "[1, 4]")),
        (lambda: losses.to_top_k(H, 1), ("[2, 3, 4]",)),
        (lambda: losses.kl_top_k(A, B, B.long(), torch.ones(2)), ("[2, 3]", "[2, 4]")),
        (lambda: losses.kl_top_k(A, A, A.long(), torch.ones(3)), ("[2, 3]", "[3]")),
    ],
)
def test_wrong_shapes_are_named(call, shapes):
    with pytest.raises(ValueError) as error:
        call()
    assert all(shape in str(error.value) for shape in shapes), str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.kl(A, A, 0.0), "temperature must be above 0"),
        (lambda: losses.kl(A, A, math.nan), "temperature must be above 0"),
        (lambda: losses.skew_kl(A, A, alpha=1.0), r"alpha must be in \[0, 1\)"),
        (lambda: losses.skew_reverse_kl(A, A, alpha=-0.1), r"alpha must be in \[0, 1\)"),
        (lambda: losses.jsd(A, A, beta=1.5, scaled=True), r"beta must be in \[0, 1\]"),
        (lambda: losses.cross_entropy(A, torch.tensor([0, 3])), r"targets must be in 0..2 \(or -100\), not 3"),
        (lambda: losses.reduce(torch.ones(2), None, 0), "denominator must be above 0"),
        (lambda: losses.reduce(torch.ones(2), None, torch.tensor(0)), "denominator must be above 0"),
        (
            lambda: losses.combine_terms({"kld": 1.0}, A, teacher_logprobs=A, denominator=1),
            "unknown loss term 'kld'; known: ce",
        ),
        (lambda: losses.combine_terms({}, A, denominator=1), "known: ce"),
        (lambda: losses.combine_terms({"ce": 1.0}, A, denominator=1), "'ce' needs targets"),
        (lambda: losses.combine_terms({"tvd": 1.0}, A, denominator=1), "'tvd' needs teacher_logprobs"),
        (lambda: losses.temperature_factor("l2", 2.0), "unknown loss term 'l2'"),
        (lambda: losses.mix_teachers(H, torch.tensor([1.0, -1.0])), "must not be negative"),
        (lambda: losses.mix_teachers(H, torch.zeros(2)), "positive sum"),
        (lambda: losses.shortcut_penalty(A, torch.zeros(3)), "positive sum"),
        (lambda: losses.pair_layers(6, 3, "skip"), "student 6, teacher 3"),
        (lambda: losses.pair_layers(3, 6, "first"), "'skip', 'last' or a list"),
        (lambda: losses.pair_layers(3, 6, [7]), r"\(1, 7\) outside"),
        (lambda: losses.to_top_k(A, 4), "k = 4"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_values_on_a_gpu_are_not_looked_at():
    """The CPU would wait for them at every step."""

    class OnGpu:
        device = torch.device("cuda")

        def any(self):
            raise AssertionError("waits for the GPU")

    assert not any_true(OnGpu()) and not any_true(torch.ones(2, device="meta") > 0)
    assert any_true(torch.tensor([False, True])) and not any_true(torch.tensor([False]))
