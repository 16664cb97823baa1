"""The last layer computes only the tokens that are read: the same scores and gradients, from fewer products."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import transformers

from distillery.config.schema import LoraSettings
from distillery.models.head import output_logits
from distillery.models.last_layer import classify, read_last_layer_at
from distillery.models.layers import configured_layers, find_layers, transformer_body
from distillery.models.packed.hidden import completion_hidden_states
from distillery.training.student import attach_adapters
from tiny import SHAPE, SMALL, causal_config

PROMPTS = [[3, 4, 8, 9], [3, 4, 10], [3, 4, 11, 12, 13]]
COMPLETIONS = [[[5], [6]], [[5], [7, 8]], [[6]]]
READ_TOKENS = 4  # the ends of three prompts, and token 7
BATCH = {
    "input_ids": torch.tensor([[1, 5, 9, 7, 3], [1, 8, 4, 0, 0], [1, 11, 12, 6, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
}


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    return model


def causal(kind: str, adapters: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(causal_config(kind)).eval()
    return drawn(attach_adapters(model, LoraSettings(r=2), "causal", 0) if adapters else model)


def classifier(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"num_labels": 3, "intermediate_size": 24, "num_key_value_heads": 2} | SMALL | SHAPE | options
    config = transformers.AutoConfig.for_model(kind, **shape)
    return drawn(transformers.AutoModelForSequenceClassification.from_config(config))


def tokens_of(model: torch.nn.Module, name: str) -> list[int]:
    """How many tokens the part `name` of the last layer computes at each call, from now on."""
    body, counts = transformer_body(model), []
    parent, attribute = find_layers(body, configured_layers(body.config))
    part = getattr(parent, attribute)[-1].get_submodule(name)
    part.register_forward_hook(lambda _part, inputs, _output: counts.append(inputs[0].shape[:-1].numel()))
    return counts


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert one.keys() == other.keys() and largest > 1e-2
    for name, gradient in one.items():  # that of a key's bias is 0 but for rounding
        assert torch.allclose(other[name], gradient, rtol=1e-4, atol=1e-6 * largest), name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_language_model_scores_and_learns_from_the_read_tokens_alone(kind, packed, monkeypatch):
    model, results = causal(kind), []
    counts = tokens_of(model, "mlp.down_proj")
    for parts in (None, ()):
        if parts is not None:
            monkeypatch.setattr("distillery.models.last_layer.TOKEN_WISE", parts)
        states = completion_hidden_states(model, PROMPTS, COMPLETIONS, packed=packed)
        logits = output_logits(model, states.hidden)
        results.append((logits, gradients(model, logits.logsumexp(-1).square().sum())))
    (few, few_gradients), (whole, whole_gradients) = results
    # a padded batch has a row for each completion
    assert counts[0] == (READ_TOKENS if packed else 6) and counts[1] > 3 * READ_TOKENS
    assert torch.allclose(few, whole, atol=1e-5)
    assert_same(whole_gradients, few_gradients)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_a_classifier_scores_and_learns_from_the_first_tokens_alone(kind):
    model, results = classifier(kind).train(), []
    classify(model, BATCH)  # compares the two ways first
    counts = tokens_of(model, "intermediate.dense")
    for whole in (False, True):
        torch.manual_seed(3)  # dropout draws the same numbers either way
        logits = classify(model, BATCH, whole=whole).logits
        results.append((logits, gradients(model, logits.square().sum())))
    (few, few_gradients), (whole, whole_gradients) = results
    assert counts == [3, 15]
    assert torch.allclose(few, whole, atol=1e-5)
    assert_same(whole_gradients, few_gradients)


def test_a_classifier_that_reads_other_tokens_computes_them():
    model = classifier("llama").eval()
    counts = tokens_of(model, "mlp.down_proj")
    with torch.no_grad():
        assert torch.equal(classify(model, BATCH).logits, model(**BATCH).logits)
    assert counts[-2:] == [15, 15]


def test_shapes_without_weights_count_all_tokens():
    model = classifier("bert").to("meta")
    counts = tokens_of(model, "intermediate.dense")
    classify(model, {name: x.to("meta") for name, x in BATCH.items()} | {"attention_mask": None})
    assert counts == [15]


def test_the_comparison_leaves_no_trace():
    model = classifier("bert", attention_probs_dropout_prob=0.2).train()
    state, before = torch.random.get_rng_state(), {name: x.clone() for name, x in model.state_dict().items()}
    with torch.autocast("cpu", torch.bfloat16):
        logits = classify(model, BATCH).logits
        logits.float().square().sum().backward()
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(
        p.grad is not None for name, p in model.named_parameters() if "layer" in name
    )  # no cast without gradients
    torch.random.set_rng_state(state)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classify(model, BATCH).logits, logits)


def test_the_comparison_leaves_modes_as_they_were_even_when_it_fails():
    model = classifier("bert", attention_probs_dropout_prob=0.3).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    for token in (10**6, 5):
        batch = {name: x.clone() for name, x in BATCH.items()}
        batch["input_ids"][0, 1] = token
        with pytest.raises(IndexError) if token > 5 else nullcontext():
            classify(model, batch)
        assert [module.training for module in model.modules()] == modes


def test_the_config_is_written_as_text_once_a_model(monkeypatch):
    model, write, written = classifier("bert").eval(), transformers.BertConfig.to_json_string, []
    monkeypatch.setattr(transformers.BertConfig, "to_json_string", lambda self: written.append(self) or write(self))
    for _ in range(3):
        classify(model, BATCH)
    assert len(written) == 1
    classify(classifier("bert").eval(), {name: x[:, :1] for name, x in BATCH.items()})
    assert len(written) == 1  # nothing to compare


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_activations_that_are_computed_again_are_those_of_all_tokens(kind):
    if kind == "bert":
        model = classifier(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        compute = lambda: classify(model, BATCH).logits  # noqa: E731
    else:
        model = causal(kind, adapters=False).train()
        compute = lambda: completion_hidden_states(model, PROMPTS, COMPLETIONS).hidden  # noqa: E731
    expected = gradients(model, compute().square().sum())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(expected, gradients(model, compute().square().sum()))


def test_a_mixture_of_experts_is_left_alone():
    torch.manual_seed(0)
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model("qwen3_moe", intermediate_size=24, head_dim=4, **shape, **SMALL, **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    counts = tokens_of(model, "mlp")
    with torch.no_grad(), read_last_layer_at(transformer_body(model), torch.tensor([4, 9])):
        transformer_body(model)(input_ids=BATCH["input_ids"])
    assert counts == [15]
