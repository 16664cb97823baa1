"""Training above frozen layers: their outputs are computed once a row, and change nothing but the time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings

from distillery.config.schema import LoraSettings, StudentConfig
from distillery.errors import UserError
from distillery.models.layers import find_layers, freeze_lower_layers, output_head, transformer_body
from distillery.models.packed import frozen_layers
from distillery.models.packed.frozen_layers import SharedStates, compute_frozen_states, count_frozen_layers
from distillery.models.packed.hidden import completion_hidden_states
from distillery.training.student import attach_adapters
from test_packed import LABELS, PROMPTS
from test_training import learner, phase, toy, trained
from tiny import CAUSAL_KINDS, causal_config

DEPTH = 4
ROWS = [[3, 4, 8, 9], [3, 4, 10], [3, 4, 11, 12, 13], [3, 4, 14, 3]]
COMPLETIONS = [[(tokens, 0) for tokens in LABELS["a shared first token"]]] * len(ROWS)


def adapted(kind: str, layers: list[int] | str = "last-2") -> torch.nn.Module:
    """A causal model of 4 layers with random adapters in some of them."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(causal_config(kind, layers=DEPTH))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
        model = attach_adapters(model, LoraSettings(r=2, layers=layers), "causal", 0)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(0, 0.3)
    return model


def log_probabilities(model, prompts, completions, frozen=None) -> torch.Tensor:
    tokens = [[completion for completion, _ in row] for row in completions]
    states = completion_hidden_states(model, prompts, tokens, frozen=frozen)
    return output_head(model)(states.hidden).float().log_softmax(-1)[states.index, states.target_ids]


def count_calls(model) -> Counter:
    """How often each layer of `model` runs, from now on."""
    parent, attribute = find_layers(transformer_body(model), DEPTH)
    calls = Counter()
    for number, layer in enumerate(getattr(parent, attribute)):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    return calls


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_frozen_layers_are_those_below_the_lowest_trained_weight(kind):
    assert count_frozen_layers(adapted(kind, "last-1")) == 3
    assert count_frozen_layers(adapted(kind, [1, 3])) == 1
    assert count_frozen_layers(adapted(kind, "all")) == 0
    model = adapted(kind)
    assert count_frozen_layers(model) == 2
    model.get_input_embeddings().weight.requires_grad_(True)
    assert count_frozen_layers(model) == 0


def test_a_layer_with_dropout_is_not_frozen():
    model = adapted("gpt2")
    parent, attribute = find_layers(transformer_body(model), DEPTH)
    getattr(parent, attribute)[1].mlp.dropout.p = 0.1
    assert count_frozen_layers(model) == 1


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_gradients_are_those_of_a_whole_pass_to_the_bit(kind):
    model = adapted(kind)
    frozen = compute_frozen_states(model, ROWS, COMPLETIONS)
    if kind == "bloom":  # takes no token trees
        assert frozen is None
        return
    weights, gradients = torch.randn(24, generator=torch.Generator().manual_seed(1)), []
    for states in (None, frozen):
        model.zero_grad()
        scores = log_probabilities(model, ROWS, COMPLETIONS, states)
        (scores * weights[: len(scores)]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any(g.abs().max() > 1e-2 for g in gradients[0].values())
    assert all(torch.equal(gradients[1][name], g) for name, g in gradients[0].items())


def test_activations_that_are_computed_again_get_no_states():
    """The backward pass runs the layers anew, after the states have left the first of them."""
    model = adapted("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert compute_frozen_states(model, ROWS, COMPLETIONS) is None


@settings(max_examples=25)
@given(PROMPTS)
def test_any_batch_of_the_rows_may_be_scored_from_their_states(prompts):
    model = adapted_llama()
    completions = [COMPLETIONS[0], [([5, 6, 7], 1)], []] * len(prompts)
    rows = [(prompt, row) for prompt, row in zip(prompts, completions, strict=False) if row]
    frozen = compute_frozen_states(model, [p for p, _ in rows], [c for _, c in rows])
    calls = count_calls(model)
    for start in range(len(rows)):
        batch = [p for p, _ in rows[start::2]], [c for _, c in rows[start::2]]
        whole = log_probabilities(model, *batch)
        calls.clear()
        continued = log_probabilities(model, *batch, frozen)
        assert calls == {2: 1, 3: 1}
        assert torch.allclose(continued, whole, atol=1e-4)


def adapted_llama(cached: list = []) -> torch.nn.Module:  # noqa: B006
    return cached[0] if cached else cached.append(adapted("llama")) or cached[0]


def test_an_unknown_row_runs_through_all_layers():
    model = adapted("llama")
    frozen, calls = compute_frozen_states(model, ROWS[:2], COMPLETIONS[:2]), count_calls(model)
    log_probabilities(model, ROWS[1:3], COMPLETIONS[1:3], frozen)
    assert calls == dict.fromkeys(range(DEPTH), 1)


def test_a_model_whose_upper_layers_read_more_than_states_keeps_none():
    model = adapted("llama")
    parent, attribute = find_layers(transformer_body(model), DEPTH)
    first, last, passed = getattr(parent, attribute)[0], getattr(parent, attribute)[3], []
    assert compute_frozen_states(model, ROWS, COMPLETIONS) is not None
    transformer_body(model).register_forward_pre_hook(lambda *_: passed.clear())
    first.register_forward_hook(lambda layer, args, output: passed.append(output))
    last.register_forward_hook(lambda layer, args, output: output + passed.pop() if passed else output)
    assert compute_frozen_states(model, ROWS, COMPLETIONS) is None


def test_states_are_shared_by_models_of_the_same_lower_layers_alone():
    model, shared = adapted("llama"), SharedStates()
    states = compute_frozen_states(model, ROWS, COMPLETIONS, shared)
    other = adapted("llama", "last-1")
    with torch.no_grad():
        parent, attribute = find_layers(transformer_body(model), DEPTH)
        for weight in getattr(parent, attribute)[2].parameters():
            weight.add_(1)
        calls = count_calls(model)
        again = compute_frozen_states(model, ROWS[1:3], COMPLETIONS[1:3], shared)
        assert not calls and again.states.items() >= states.states.items()
        compute_frozen_states(model, [[3, 4, 5]], COMPLETIONS[:1], shared)
        assert calls[0] > 0  # one row is new
        lower = getattr(parent, attribute)[1]
        changes = [shared.of(other, 3), shared.of(model.bfloat16(), 2)]
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            changes.append(shared.of(model, 2))
        next(lower.parameters()).add_(1)
        changes.append(shared.of(model, 2))
    assert [known.states for known in changes] == [{}] * 4


def test_states_that_need_too_much_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr(frozen_layers, "MAX_BYTES", 100)
    assert compute_frozen_states(adapted("llama"), ROWS, COMPLETIONS) is None


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_and_the_layers_of_the_model_stay(training):
    model = adapted("llama").train(training)
    parent, attribute = find_layers(transformer_body(model), DEPTH)
    before = list(getattr(parent, attribute))
    compute_frozen_states(model, ROWS, COMPLETIONS)
    assert model.training is training and list(getattr(parent, attribute)) == before
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in before)


def test_adapters_in_layers_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"layers: last-9 does not fit a model with layers 0 to 3"):
        adapted("llama", "last-9")


def test_adapters_are_in_the_named_layers_alone():
    names = [name for name, weight in adapted("llama", [1, 3]).named_parameters() if weight.requires_grad]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == {1, 3}
    assert np.unique([name.split(".")[-2] for name in names]).tolist() == ["default"]


# ------------------------------------------------------------------------------- students that are trained above


@pytest.mark.parametrize("kind", CAUSAL_KINDS)
def test_embeddings_and_lower_layers_of_a_causal_model_are_not_trained(kind):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(causal_config(kind, layers=DEPTH))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    freeze_lower_layers(model, 3)
    assert count_frozen_layers(model) == 3
    parent, attribute = find_layers(transformer_body(model), DEPTH)
    *lower, last = getattr(parent, attribute)
    assert all(weight.requires_grad for weight in last.parameters())
    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    frozen = [weight for module in [*lower, *embeddings] for weight in module.parameters()]
    assert frozen and not any(weight.requires_grad for weight in frozen)
    assert transformer_body(model)(input_ids=torch.tensor([[3, 4]]))[0].requires_grad


@pytest.mark.parametrize(
    ("arch", "trained_parts"),
    [
        ("classifier", {"encoder.layer.3", "pooler", "classifier"}),
        ("seq2seq", {"encoder.block.3", "encoder.final_layer_norm", "decoder.block.3", "decoder.final_layer_norm"}),
    ],
)
def test_a_student_is_trained_above_its_frozen_layers(tiny_models, tmp_path, arch, trained_parts):
    student = learner(tiny_models, arch, init={"freeze": "first-3"}, prompt="plain")
    before = {name: weight.detach().clone() for name, weight in student.model.named_parameters()}
    trained(student, toy(8), phase({"ce": 1.0}, steps=3, learning_rate=0.01), tmp_path / "run")
    changed = {name for name, weight in student.model.named_parameters() if not torch.equal(weight, before[name])}
    assert all(any(part in name for part in trained_parts) for name in changed)
    assert {part for part in trained_parts if any(part in name for name in changed)} == trained_parts


def test_a_student_of_kept_states_is_that_of_whole_passes(tiny_models, tmp_path, monkeypatch):
    """Five epochs over the same rows: the lower layers run once for each, and the weights end the same."""
    spec, ends = phase({"ce": 1.0}, epochs=5, batch_size=4, learning_rate=0.01), []
    for name, limit in (("states", frozen_layers.MAX_BYTES), ("whole", 0)):
        monkeypatch.setattr(frozen_layers, "MAX_BYTES", limit)
        student = learner(tiny_models, "causal", init={"freeze": "first-2"}, prompt="plain")
        calls = count_calls(student.model)
        trained(student, toy(8), spec, tmp_path / name)
        ends.append((student.model.state_dict(), calls))
    (kept, calls), (whole, whole_calls) = ends
    assert calls[0] <= calls[3] - 8 and whole_calls[0] == whole_calls[3]  # of ten steps
    assert all(torch.allclose(kept[name], weight, atol=1e-6) for name, weight in whole.items())


def test_a_model_without_a_layer_to_train_is_refused(tiny_models):
    with pytest.raises(UserError, match="init.freeze: first-4 leaves none of the 4 layers to train"):
        learner(tiny_models, "causal", init={"freeze": "first-4"})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"init": {"freeze": "last-2"}}, "pattern"),
        ({"init": {"freeze": "first-2"}, "adapter": {"kind": "lora"}}, "`init.freeze: first-2` is without `adapter`"),
    ],
)
def test_frozen_layers_are_the_lowest_and_without_adapters(more, message):
    with pytest.raises(ValueError, match=message):
        StudentConfig(model="m", arch="causal", phases=[], **more)
