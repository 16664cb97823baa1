"""Cheap dropout and partial embeddings: the same training as torch's own, or the same distribution."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.models.fast_cpu import BitDropout, PartialEmbedding, train_used_embeddings
from tiny import SMALL


@given(st.integers(0, 2**31), st.sampled_from([0, None]))
@settings(max_examples=25)
def test_a_partial_embedding_learns_what_a_full_one_learns(seed, padding):
    """AdamW without decay moves no row that has never had a gradient: then both are the same training."""
    draw = torch.Generator().manual_seed(seed)
    full, target = torch.nn.Embedding(50, 6, padding_idx=padding), torch.randn(50, 6, generator=draw)
    full.weight.data = torch.randn(50, 6, generator=draw)
    before = full.weight.detach().clone()
    ids = [0, *torch.randperm(50, generator=draw)[:9].tolist()]
    copy = torch.nn.Embedding(50, 6, padding_idx=padding)
    copy.weight.data = before.clone()
    partial = PartialEmbedding(copy, ids)
    assert [name for name, p in partial.named_parameters() if p.requires_grad] == ["rows"]
    assert len(partial.rows) == len(set(ids))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.0) for m in (partial, full)]
    for _ in range(8):
        batch = torch.tensor(ids)[torch.randint(len(ids), (3, 4), generator=draw)]
        for module, optimizer in zip((partial, full), optimizers, strict=True):
            optimizer.zero_grad()
            (module(batch) - target[batch]).square().sum().backward()
            optimizer.step()
        with torch.no_grad():  # between steps any token may be looked up
            torch.testing.assert_close(partial(torch.arange(50)), full(torch.arange(50)), rtol=0, atol=1e-6)
    end = partial.merged()
    assert end is copy
    others = [i for i in range(50) if i not in ids]
    assert torch.equal(end.weight[others], before[others]) and not torch.equal(end.weight[ids], before[ids])
    with pytest.raises(IndexError):
        partial(torch.tensor(others[:1]))


def test_an_embedding_that_encoder_and_decoder_share_is_trained_whole():
    config = transformers.T5Config(**SMALL, d_model=16, d_ff=24, d_kv=4, num_layers=1, num_heads=2)
    model = transformers.T5ForSequenceClassification(config)
    before = model.get_input_embeddings()
    train_used_embeddings(model, [1, 2])
    assert model.get_input_embeddings() is before and before.weight.requires_grad


@given(st.integers(0, 2**31), st.floats(0.05, 0.9), st.sampled_from([(3,), (7, 5), (64, 33)]))
@settings(max_examples=25)
def test_dropout_by_bits_drops_its_share_and_scales_what_stays(seed, p, shape):
    module = BitDropout(p)
    x = torch.ones(shape, requires_grad=True)
    torch.manual_seed(seed)
    dropped = module(x)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert all(value == 0 or value == pytest.approx(1 / (1 - p), rel=1e-3) for value in dropped.unique().tolist())
    torch.manual_seed(seed)
    assert torch.equal(module(x), dropped)
    assert not torch.equal(module(torch.ones(64, 64)), module(torch.ones(64, 64)))
    assert torch.equal(module.eval()(x), x)


def test_dropout_by_bits_draws_every_element_alone():
    torch.manual_seed(0)
    n = 400_000
    kept = (BitDropout(0.1)(torch.ones(n)) > 0).double()
    sigma = (0.09 / n) ** 0.5
    assert abs(kept.mean() - 0.9) < 4 * sigma
    lanes = kept.view(-1, 4)  # four elements share one draw of 64 bits
    assert (abs(lanes.mean(0) - 0.9) < 4 * 2 * sigma).all()
    apart = torch.corrcoef(lanes.T) - torch.eye(4)
    assert abs(apart).max() < 4 / (n / 4) ** 0.5
    assert abs(torch.corrcoef(torch.stack([kept[:-1], kept[1:]]))[0, 1]) < 4 / n**0.5
    assert BitDropout(0.0)(torch.ones(3)).tolist() == [1, 1, 1] and BitDropout(1.0)(torch.ones(3)).sum() == 0
