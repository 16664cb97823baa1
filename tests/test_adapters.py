"""Adapters that scale r numbers a token instead of all outputs: the same bits, fewer of them touched."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from distillery.config.schema import LoraSettings
from distillery.models.load import load_model
from distillery.training.adapters import SCALED
from distillery.training.student import attach_adapters

PEFT_CLASSES = {scaled: original for original, scaled in SCALED.items()}


def adapted(tiny_models, quantize: bool, dtype: str) -> torch.nn.Module:
    """A language model with drawn adapters in all linear layers, their scaling 2."""
    model = load_model(tiny_models / "tiny-llama", "causal", dtype=dtype, quantize=quantize)
    model = attach_adapters(model.requires_grad_(False), LoraSettings(r=4), "causal", 0)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = torch.nn.init.normal_(weight.data.float(), std=0.3)
    return model


def outputs_and_gradients(model: torch.nn.Module, dtype: str) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(input_ids=torch.arange(5, 25)[None]).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return [logits.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [False, True], ids=["whole", "4 bits"])
def test_scaling_the_low_rank_changes_no_bit(tiny_models, quantize, dtype):
    model = adapted(tiny_models, quantize, dtype)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 28 and {type(layer) for layer in layers} <= set(SCALED.values())
    scaled = outputs_and_gradients(model, dtype)
    for layer in layers:
        layer.__class__ = PEFT_CLASSES[type(layer)]
    original = outputs_and_gradients(model, dtype)
    assert all(torch.equal(a, b) for a, b in zip(scaled, original, strict=True))
    assert all(gradient.any() for gradient in original)


def test_adapters_can_be_switched_off_and_merged(tiny_models):
    model, tokens = adapted(tiny_models, False, "float32"), torch.arange(5, 25)[None]
    with torch.no_grad():
        tuned = model(input_ids=tokens).logits
        with model.disable_adapter():
            untuned = model(input_ids=tokens).logits
        merged = model.merge_and_unload()(input_ids=tokens).logits
    assert (tuned - untuned).abs().max() > 0.1
    torch.testing.assert_close(merged, tuned, atol=1e-4, rtol=1e-4)
