"""The packed form of a teacher's likeliest tokens and of its rest, against dense distributions."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import tiny
from distillery import losses
from distillery.config.schema import PhaseConfig
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import TaskPrompt, load_task
from distillery.training.kept_tokens import (
    LEVELS,
    LOWEST,
    decode_logprobs,
    encode_logprobs,
    id_type,
    sample_rest,
    scaled_to_tail,
)
from distillery.training.teacher_outputs import collect_teacher_outputs

seeds = st.integers(0, 2**31 - 1)


def distributions(seed: int, rows: int = 3, size: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's logits and a teacher's log-probabilities [rows, size], float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(rows, size, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return student, teacher.log_softmax(-1)


@given(st.lists(st.floats(-200, 0, width=32), min_size=1, max_size=40))
def test_a_byte_is_as_near_as_promised(values):
    logprobs = np.array(values, dtype=np.float32)
    read = decode_logprobs(encode_logprobs(logprobs))
    held = np.clip(logprobs, LOWEST, 0)
    assert (np.abs(read - held) <= np.sqrt(LOWEST * held) / LEVELS + 1e-4).all()
    assert encode_logprobs(read).tolist() == encode_logprobs(logprobs).tolist()
    assert decode_logprobs(encode_logprobs(np.zeros(1))) == 0


def test_ids_take_the_fewest_bytes():
    assert [np.dtype(id_type(size)).itemsize for size in (10, 49_152, 65_536, 65_537, 151_936)] == [2, 2, 2, 4, 4]


@settings(max_examples=25)
@given(seed=seeds, k=st.integers(1, 50))
def test_the_kept_tokens_and_the_rest_have_a_mass_of_one(seed, k):
    _, teacher = distributions(seed)
    values, _, log_tail = losses.to_top_k(teacher, k)
    read = scaled_to_tail(torch.from_numpy(decode_logprobs(encode_logprobs(values.numpy()))), log_tail)
    mass = read.double().exp().sum(-1) + log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(seed=seeds, k=st.integers(1, 49), count=st.integers(1, 60))
def test_each_token_of_the_rest_is_drawn_in_proportion_to_its_probability(seed, k, count):
    """Within one draw: that is what systematic sampling adds to independent draws."""
    _, teacher = distributions(seed)
    _, indices, _ = losses.to_top_k(teacher, k)
    drawn, entropy = sample_rest(teacher, indices, count, seed)
    rest = teacher.exp().scatter(1, indices, 0.0)
    rest = rest / rest.sum(-1, keepdim=True)
    frequency = torch.zeros_like(rest).scatter_add(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    assert ((frequency - count * rest).abs() < 1 + 1e-6).all() and (frequency.gather(1, indices) == 0).all()
    torch.testing.assert_close(entropy, torch.special.entr(rest).sum(-1))


@settings(max_examples=20)
@given(seed=seeds, k=st.integers(1, 40))
def test_a_rest_that_is_drawn_in_its_proportions_gives_the_whole_divergence_and_gradient(seed, k):
    student, teacher = distributions(seed)
    values, indices, log_tail = losses.to_top_k(teacher, k)
    outside = torch.ones_like(teacher).scatter(1, indices, 0.0).bool()
    flat = teacher.masked_scatter(outside, (log_tail - math.log(50 - k)).repeat_interleave(50 - k))
    samples, entropy = sample_rest(flat, indices, 50 - k, seed)
    student.requires_grad_()
    whole = losses.kl(student, flat)
    estimate = losses.kl_sampled_rest(student, values, indices, log_tail, samples, entropy)
    torch.testing.assert_close(estimate, whole)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (whole, estimate)]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_estimate_has_no_bias_and_the_rest_as_one_outcome_has():
    student, teacher = distributions(1, rows=1)
    student.requires_grad_()
    kept = losses.to_top_k(teacher, 5)
    whole = losses.kl(student, teacher)
    estimates = torch.cat(
        [losses.kl_sampled_rest(student, *kept, *sample_rest(teacher, kept[1], 4, seed)) for seed in range(800)]
    )
    error = (estimates.std() / math.sqrt(800)).item()
    assert estimates.mean().item() == pytest.approx(whole.item(), abs=4 * error)
    assert whole.item() - losses.kl_top_k(student, *kept).item() > 20 * error
    mean, dense = (torch.autograd.grad(value, student)[0] for value in (estimates.mean(), whole.sum()))
    assert (mean - dense).abs().max() < 0.02 and dense.abs().max() > 0.2


def test_a_rest_without_mass_costs_nothing():
    student, teacher = distributions(2)
    values, indices, log_tail = losses.to_top_k(teacher, 50)
    samples, entropy = sample_rest(teacher, indices, 3, 0)
    estimate = losses.kl_sampled_rest(student, values, indices, log_tail, samples, entropy)
    torch.testing.assert_close(estimate, losses.kl(student, teacher))


def test_samples_that_do_not_fit_are_named():
    student, teacher = distributions(3)
    kept = losses.to_top_k(teacher, 5)
    for shape, entropies in (((3, 0), 3), ((2, 4), 3), ((3, 4), 2)):
        with pytest.raises(ValueError, match=r"samples \[n, m\] with m > 0 and entropy \[n\], not"):
            losses.kl_sampled_rest(student, *kept, torch.zeros(shape, dtype=torch.int64), torch.zeros(entropies))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"top_k": None}, "`tail_samples` needs `top_k`, and `kl` as the only divergence"),
        ({"loss": {"kl": 0.5, "jsd": 0.5}}, "`tail_samples` needs `top_k`, and `kl` as the only divergence"),
        ({"loss": {"jsd": 1.0}}, "`tail_samples` needs `top_k`, and `kl` as the only divergence"),
        ({"loss": {"kl": 0.5, "uld": 0.5}}, "`top_k` needs `space: vocabulary`, one teacher, a divergence in `loss`"),
        ({"temperature": 2.0}, "`top_k` needs `temperature: 1`"),
    ],
)
def test_a_phase_with_top_k_refuses_what_does_not_fit(change, line):
    phase = {"data": ["a/train"], "teachers": ["t"], "loss": {"kl": 1.0, "ce": 1.0}, "steps": 1, "learning_rate": 1e-3}
    phase |= {"space": "vocabulary", "top_k": 4, "tail_samples": 2}
    assert PhaseConfig.model_validate(phase).tail_samples == 2
    with pytest.raises(ValidationError, match=re.escape(line)):
        PhaseConfig.model_validate(phase | change)


def test_stored_tokens_are_packed_and_those_of_labels_exact(tiny_models, tmp_path):
    task = load_task("finance-sentiment", tiny.ROOT / "tasks")
    task = task.model_copy(update={"prompt": TaskPrompt(template="{text}")})
    folder = tiny_models / "tiny-llama"
    model = LabelModel(load_model(folder, "causal").eval(), load_tokenizer(folder), task, "causal", prompt="plain")
    texts = ["Profit rose.", "Sales fell in May."]
    completions = [model.row_completions(i, "net sales and profit rose in the quarter") for i in range(2)]
    settings = {"fold": [-1] * 2, "completions": lambda _: completions}
    dense = collect_teacher_outputs(tmp_path / "dense", lambda _: model, texts, **settings)
    packed = collect_teacher_outputs(tmp_path / "kept", lambda _: model, texts, **settings, top_k=6, tail_samples=5)
    kinds = [
        np.load(tmp_path / f"kept/{name}.npy", mmap_mode="r").dtype for name in ("token_logprobs", "token_indices")
    ]
    assert kinds == [np.uint8, np.uint16] and isinstance(packed.token_logprobs, np.memmap)
    n = int(dense.token_offsets[-1])
    exact = len(packed.exact_positions)
    assert packed.bytes_a_token == pytest.approx(6 * 3 + 4 + 2 + 5 * 2 + exact / n * (8 + 6 * 2))
    tail = losses.to_top_k(dense.logprobs([0, 1]), 6)[2].exp().mean().item()
    assert packed.mean_tail == pytest.approx(tail, rel=2e-3)
    for rows in ([0], [1, 0]):
        logprobs = dense.logprobs(rows)
        values, indices, log_tail = packed.top_k(rows)
        known, known_tail = logprobs.gather(1, indices), losses.to_top_k(logprobs, 6)[2]
        torch.testing.assert_close(log_tail, known_tail, rtol=1e-3, atol=1e-3)
        lengths = [[len(tokens) - skip for tokens, skip in completions[i]] for i in rows]
        label = torch.tensor([j == 0 for row in lengths for j, length in enumerate(row) for _ in range(length)])
        assert 0 < label.sum() < len(label)
        torch.testing.assert_close(values[label], known[label], rtol=1e-3, atol=1e-3)
        assert ((values - known).abs() <= 0.02 + 0.04 * known.abs().sqrt()).all()
        samples, entropy = packed.rest(rows)
        assert samples.shape == (len(label), 5) and not (samples[:, :, None] == indices[:, None]).any()
        rest = logprobs.exp().scatter(1, indices, 0.0)
        rest = rest / rest.sum(-1, keepdim=True)
        torch.testing.assert_close(entropy, torch.special.entr(rest).sum(-1), rtol=1e-2, atol=1e-2)
