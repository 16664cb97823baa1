"""Layers: which are kept, and what the cut model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import tiny
from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.models.layers import keep_layers, layer_indices
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import load_task

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
SMALL, SHAPE = tiny.SMALL, tiny.SHAPE | {"num_hidden_layers": 4}


def test_layer_rules():
    assert layer_indices("all", 4) == [0, 1, 2, 3]
    assert layer_indices("first-3", 6) == [0, 1, 2]
    assert layer_indices("last-2", 6) == [4, 5]
    assert layer_indices("every-2", 5) == [0, 2, 4]
    assert layer_indices([5, 0], 6) == [5, 0]


@pytest.mark.parametrize("layers", ["first-7", "last-7", [0, 6]])
def test_layers_that_do_not_exist_are_named(layers):
    with pytest.raises(UserError) as caught:
        layer_indices(layers, 6)
    assert str(caught.value) == f"layers: {layers} does not fit a model with layers 0 to 5"


ENCODERS = {
    "bert": lambda: transformers.BertConfig(**SMALL, **SHAPE, intermediate_size=24),
    "roberta": lambda: transformers.RobertaConfig(**SMALL, **SHAPE, intermediate_size=24),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=tiny.VOCABULARY, dim=16, n_layers=4, n_heads=4, hidden_dim=24
    ),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_cut_encoder_is_the_chosen_layers_in_order(kind, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(ENCODERS[kind]()).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    indices, before = [0, 3], [layer.state_dict() for layer in stack(model)]
    keep_layers(model, indices)
    after = [layer.state_dict() for layer in stack(model)]
    for new, old in zip(after, indices, strict=True):
        assert all(torch.equal(new[key], before[old][key]) for key in new)
    assert model.config.num_hidden_layers == 2
    with torch.no_grad():
        expected = model(ids).logits
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.allclose(again(ids).logits, expected, atol=1e-6)
    assert len(stack(again)) == 2


def stack(model) -> torch.nn.ModuleList:
    return max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)


@pytest.mark.parametrize("kind", tiny.CAUSAL_KINDS)
def test_a_cut_causal_model_generates_with_its_cache_and_comes_back_from_disk(kind, tmp_path):
    config = tiny.causal_config(kind)
    setattr(config, config.attribute_map.get("num_hidden_layers", "num_hidden_layers"), 5)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 5
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    keep_layers(model, "every-2")
    assert model.config.num_hidden_layers == len(stack(model)) == 3
    ids = torch.tensor([[5, 6, 7]])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(UserError, match="has no list of 3 layers"):
        model = torch.nn.Linear(2, 2)
        model.config = transformers.BertConfig(num_hidden_layers=3)
        keep_layers(model, [0])


def test_both_stacks_of_an_encoder_and_decoder_are_cut(tiny_models, tmp_path):
    whole = load_model(tiny_models / "tiny-t5", "seq2seq")
    cut = load_model(tiny_models / "tiny-t5", "seq2seq", layers=[1, 3])
    for name in ("encoder", "decoder"):
        before, after = getattr(whole, name).block, getattr(cut, name).block
        assert len(after) == 2
        for new, old in enumerate((1, 3)):
            weights = after[new].layer[-1].DenseReluDense.wo.weight
            assert torch.equal(weights, before[old].layer[-1].DenseReluDense.wo.weight)
        distances = after[0].layer[0].SelfAttention.relative_attention_bias.weight
        assert torch.equal(distances, before[0].layer[0].SelfAttention.relative_attention_bias.weight)
    ids = torch.tensor([[5, 6, 7, 8]])
    cut.save_pretrained(tmp_path)
    again = load_model(tmp_path, "seq2seq")
    inputs = {"input_ids": ids, "decoder_input_ids": torch.tensor([[0, 4]])}
    with torch.no_grad():
        assert torch.equal(cut(**inputs).logits, again(**inputs).logits)
    model = LabelModel(again, load_tokenizer(tiny_models / "tiny-t5"), TASK, "seq2seq", prompt="plain")
    both = model.generate_tokens([[5, 6, 7, 8], [9, 5]], max_new_tokens=4)
    assert both == [model.generate_tokens([row], max_new_tokens=4)[0] for row in ([5, 6, 7, 8], [9, 5])]


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 2], [3]])
def test_the_benchmark_of_spare_layers_reads_as_the_cut_model_does(tiny_models, kept):
    texts = ["Sales rose.", "The loss widened a lot."]
    reader = tiny.load_benchmark("spare_layers").Reader(tiny_models / "tiny-llama", texts)
    model = load_model(tiny_models / "tiny-llama", "causal", layers=kept).eval()
    tokenizer = load_tokenizer(tiny_models / "tiny-llama")
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        logits = model(ids).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    with torch.no_grad():
        assert reader.nats(kept) == pytest.approx(np.mean(losses), abs=1e-5)
