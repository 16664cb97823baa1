"""Token trees: scores, gradients and prefixes against plain forward passes."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from distillery.config.schema import LoraSettings
from distillery.models.layers import output_head
from distillery.models.packed import attention
from distillery.models.packed.attention import supports_token_trees
from distillery.models.packed.decoding import compute_prefix_kv
from distillery.models.packed.hidden import completion_hidden_states
from distillery.models.packed.token_tree import common_prefix, pack_token_tree
from distillery.training.student import attach_adapters
from tiny import CAUSAL_KINDS, END, VOCABULARY, causal_config

LABELS = {
    "one token": [[5], [6], [7]],
    "a shared first token": [[5, 6], [5, 7, 8], [9]],
    "nested, with the end token": [[5, END], [5, 6, END], [7, END]],
}


@cache
def causal(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(causal_config(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a wrong mask or position shows
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
    return model


@pytest.fixture(params=["products", "fused"])
def way(request, monkeypatch) -> str:
    """The way of the attention of trees: that of a CPU, and that of a GPU."""
    monkeypatch.setattr(attention, "FUSED_DEVICES", ("cpu",) if request.param == "fused" else ())
    return request.param


def score_plainly(model, prompts, completions) -> torch.Tensor:
    """Log-probability of every completion by one forward pass of each whole sequence."""
    scores = []
    for prompt, row in zip(prompts, completions, strict=True):
        for completion in row:
            input_ids = torch.tensor([prompt + completion])
            logits = model(input_ids=input_ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            scores.append(logits.float().log_softmax(-1)[range(len(completion)), completion].sum())
    return torch.stack(scores)


def score_by_tree(model, prompts, completions, prefix_kv=None) -> torch.Tensor:
    """The same from token trees: [completions], summed over their tokens."""
    states = completion_hidden_states(model, prompts, completions, prefix_kv=prefix_kv)
    scores = output_head(model)(states.hidden).float().log_softmax(-1)[states.index, states.target_ids]
    return torch.zeros(sum(map(len, completions))).index_add(0, states.completion_index, scores)


def tokens(min_size: int, max_size: int):
    return st.lists(st.integers(3, VOCABULARY - 1), min_size=min_size, max_size=max_size)


PROMPTS = st.tuples(tokens(0, 6), st.lists(tokens(1, 7), min_size=1, max_size=5)).map(
    lambda drawn: [drawn[0] + own for own in drawn[1]]
)


def test_all_architectures_but_alibi_models_take_trees():
    assert [supports_token_trees(causal(kind)) for kind in CAUSAL_KINDS] == [
        True,
        True,
        True,
        True,
        False,
    ]  # Bloom has ALiBi


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
@pytest.mark.parametrize("labels", LABELS)
def test_trees_score_as_plain_forward_passes_do(kind, labels):
    @settings(max_examples=12, derandomize=True)
    @given(PROMPTS)
    def check(prompts):
        completions = [LABELS[labels]] * len(prompts)
        with torch.no_grad():
            expected = score_plainly(causal(kind), prompts, completions)
            assert torch.allclose(score_by_tree(causal(kind), prompts, completions), expected, atol=1e-4)

    check()


@pytest.mark.usefixtures("way")
def test_rows_may_have_completions_of_their_own():
    rng = np.random.default_rng(0)
    prompts = [[3, 4, *rng.integers(3, VOCABULARY, n).tolist()] for n in (1, 6, 3)]
    completions = [[[5]], [[5, 6], [7]], [[9, 9, 9], [5], [6, 5]]]
    for kind in CAUSAL_KINDS:
        with torch.no_grad():
            scores = score_by_tree(causal(kind), prompts, completions)
            assert torch.allclose(scores, score_plainly(causal(kind), prompts, completions), atol=1e-4), kind


@pytest.mark.parametrize("labels", LABELS)
def test_a_prefix_computed_before_gives_the_same_scores(labels):
    rng = np.random.default_rng(1)
    prompts = [[3, 4, 5, 6, *rng.integers(3, VOCABULARY, n).tolist()] for n in (1, 5, 2, 5)]
    for kind in CAUSAL_KINDS:
        model, completions = causal(kind), [LABELS[labels]] * len(prompts)
        with torch.no_grad():
            prefix_kv = compute_prefix_kv(model, prompts[0][:4])
            assert (prefix_kv is None) == (kind == "bloom")
            for batch in (prompts, prompts[1:2]):  # one prefix serves batches of every size
                labels_of_batch = completions[: len(batch)]
                scores = score_by_tree(model, batch, labels_of_batch, prefix_kv)
                expected = score_plainly(model, batch, labels_of_batch)
                assert torch.allclose(scores, expected, atol=1e-4), kind
    assert compute_prefix_kv(causal("llama"), []) is None


@pytest.mark.parametrize("limit", [attention.FUSED_TOKENS, 31])
def test_long_sequences_are_attended_to_by_products(monkeypatch, way, limit):
    """A mask over a whole long sequence would be mostly zeros. This tree has 32 tokens."""
    used = set()
    for name in ("_attend_with_prefix", "_attend_fused"):
        original = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *given, f=original, n=name: used.add(n) or f(*given))
    monkeypatch.setattr(attention, "FUSED_TOKENS", limit)
    score_by_tree(causal("llama"), [[3, 4, 5], [3, 4, 6]], [[[5]]] * 2)
    fused = way == "fused" and limit >= 32
    assert used == {"_attend_fused" if fused else "_attend_with_prefix"}


def test_a_tree_holds_the_shared_tokens_once_and_no_last_token():
    tree = pack_token_tree([[3, 4, 5, 6], [3, 4, 7]], [LABELS["a shared first token"]] * 2)
    assert tree.prefix_length == 2
    assert tree.input_ids[0, :11].tolist() == [3, 4, 5, 6, 5, 5, 7, 7, 5, 5, 7]
    assert tree.position_ids[0, :11].tolist() == [0, 1, 2, 3, 4, 4, 5, 2, 3, 3, 4]
    assert tree.input_ids.shape == tree.position_ids.shape == (1, 32) and tree.own_index.shape == (2, 8)  # few shapes
    cached = pack_token_tree([[3, 4, 5, 6], [3, 4, 7]], [[[5]]] * 2, [(torch.zeros(1, 2, 4),) * 2])
    assert cached.prefix_length == 2 and cached.input_ids[0, :3].tolist() == [5, 6, 7]
    assert cached.position_ids[0, :3].tolist() == [2, 3, 2] and cached.logit_positions.tolist() == [1, 2]
    assert common_prefix([[3, 4], [3, 4]]) == 1  # each row keeps a token of its own
    assert common_prefix([[3]]) == 0


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_adapters_get_the_gradients_of_plain_forward_passes(kind, checkpointing):
    model = transformers.AutoModelForCausalLM.from_config(causal_config(kind))
    model.load_state_dict(causal(kind).state_dict())
    model = attach_adapters(model, LoraSettings(r=2), "causal", 0)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(0, 0.3)
    model.eval()
    if checkpointing:
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.activation_checkpointing_enable({"use_reentrant": False})
    prompts, completions = [[3, 4, 8, 9], [3, 4, 10], [3, 4, 11, 12, 13]], [LABELS["a shared first token"]] * 3
    weights = torch.randn(9, generator=torch.Generator().manual_seed(1))
    gradients = []
    for score in (score_plainly, score_by_tree):
        model.zero_grad()
        (score(model, prompts, completions) * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in adapters.items()})
    assert any(g.abs().max() > 1e-2 for g in gradients[0].values())
    for name in adapters:
        assert torch.allclose(gradients[1][name], gradients[0][name], atol=1e-4, rtol=1e-3), name


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("prompts", [[[3]], [[3, 4, 5]], [[3, 4], [5, 6, 7]], [[3, 4, 5, 6], [7]]])
def test_a_single_row_and_rows_that_share_nothing_give_finite_gradients(prompts):
    model = causal("llama")
    model.zero_grad()
    scores = score_by_tree(model, prompts, [LABELS["nested, with the end token"]] * len(prompts))
    scores.sum().backward()
    assert scores.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


@pytest.mark.usefixtures("way")
def test_half_precision_stays_near():
    model = transformers.AutoModelForCausalLM.from_config(causal_config("llama"))
    model.load_state_dict(causal("llama").state_dict())
    prompts, completions = [[3, 4, 8, 9], [3, 4, 10]], [LABELS["one token"]] * 2
    with torch.no_grad():
        exact = score_plainly(model, prompts, completions)
        half = score_by_tree(model.bfloat16(), prompts, completions)
    assert half.dtype == torch.float32 and torch.allclose(half, exact, atol=0.3)
