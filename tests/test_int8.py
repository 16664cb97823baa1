"""Products of 8-bit integers: their rounding, and the models that predict with them."""

from __future__ import annotations

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from architectures import random_model
from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models import int8
from distillery.models.int8 import (
    Int8Linear,
    load_int8_model,
    quantize_int8,
    quantize_rows,
    rounding_error,
    stored_dtype,
)
from distillery.models.layers import count_parameters, output_head
from distillery.models.load import load_model
from distillery.tasks.schema import load_task
from distillery.teachers.identity import model_identity
from distillery.training.teacher_models import load_teacher_model
from tiny import ROOT

TASK = load_task("finance-sentiment", ROOT / "tasks")
TEXTS = ["Sales rose.", "Profit fell by a third as costs kept rising.", "The meeting is in May."]


def test_rows_are_rounded_to_bytes_with_a_scale_each():
    x = torch.tensor([[127.0, -63.4, 0.0], [0.5, 1.0, -2.54], [0.0, 0.0, 0.0]])
    rows, scale = quantize_rows(x)
    assert rows.tolist() == [[127, -63, 0], [25, 50, -127], [0, 0, 0]]
    assert scale[:2, 0].tolist() == pytest.approx([1.0, 0.02])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_the_rounded_inputs_and_weights(dtype):
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 24).to(dtype), torch.randn(2, 5, 48).to(dtype)
    x[0, 0, 0] = 60.0  # an outlier coarsens its own token only
    x[1, 1] = 0.0
    output = Int8Linear(linear)(x)
    assert output.dtype == dtype and output.shape == (2, 5, 24)
    weight = linear.weight.detach().double()
    w_scale = weight.abs().amax(1, keepdim=True) / 127
    x_scale = x.double().abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    rounded = (x.double() / x_scale).round() * x_scale @ ((weight / w_scale).round() * w_scale).T
    expected = rounded + linear.bias.detach().double()
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7 * expected.abs().max().item()
    assert torch.allclose(output.double(), expected, atol=tolerance, rtol=0)
    assert torch.allclose(output[1, 1], linear.bias.detach(), atol=tolerance)


def teacher(folder, quantize: str):
    spec = TeacherConfig(kind="lm", model="m", quantize=quantize, few_shot=2)
    return load_teacher_model("t", spec, ModelConfig(folder=str(folder)), TASK)


def test_a_prompted_teacher_predicts_nearly_what_the_dense_one_does(tiny_models):
    dense, quick = (teacher(tiny_models / "tiny-llama", quantize) for quantize in ("none", "int8"))
    layers = [type(layer) for layer in quick.model.modules() if isinstance(layer, (nn.Linear, Int8Linear))]
    assert layers.count(nn.Linear) == 1 and type(output_head(quick.model)) is nn.Linear
    probabilities = quick.predict(TEXTS)
    difference = np.abs(probabilities - dense.predict(TEXTS)).max()
    assert 0 < difference < 0.02
    assert np.allclose(quick.predict(TEXTS[1:]), probabilities[1:], atol=2e-3)  # whatever is predicted beside it
    origin = ModelConfig(folder=str(tiny_models / "tiny-llama"))
    assert [model_identity("m", origin, model)["quantization"] for model in (dense, quick)] == [None, "int8"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])  # the last one computes a buffer in the loaded format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_quantized_as_they_are_stored_to_the_bit(tmp_path, name, dtype):
    random_model(name, 64).to(dtype).save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) == str(dtype).removeprefix("torch.")
    wide = quantize_int8(load_model(tmp_path, "causal", dtype="float32"))
    narrow = load_int8_model(tmp_path, "causal", dtype="float32")
    assert narrow.dtype == wide.dtype == narrow.config.dtype == torch.float32
    for parts in ("named_parameters", "named_buffers"):
        expected, found = (dict(getattr(model, parts)()) for model in (wide, narrow))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(wide(input_ids=ids).logits, narrow(input_ids=ids).logits)


def test_weights_in_float32_are_loaded_as_they_are(tmp_path):
    model = random_model("llama", 64)
    model.save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) is None
    expected = quantize_int8(model).state_dict()
    found = load_int8_model(tmp_path, "causal", dtype="float32").state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_dense_layer_goes_as_soon_as_its_bytes_are_there(monkeypatch):
    """All layers in float32 beside all of them in bytes would take five times what is left."""
    model, alive = random_model("llama", 64), []
    weights = [
        weakref.ref(layer) for layer in model.modules() if type(layer) is nn.Linear and layer is not model.lm_head
    ]

    class Counted(Int8Linear):
        def __init__(self, linear):
            alive.append(sum(layer() is not None for layer in weights))
            super().__init__(linear)

    monkeypatch.setattr(int8, "Int8Linear", Counted)
    quantize_int8(model)
    assert alive == list(range(len(weights), 0, -1))


def test_quantizing_changes_no_number_of_parameters(tiny_models):
    models = [teacher(tiny_models / "tiny-llama", quantize).model.model for quantize in ("none", "int8")]
    dense, quick = (count_parameters(model)[0] for model in models)
    assert dense == quick == sum(weight.numel() for weight in models[0].parameters())


def test_methods_may_differ_by_the_rounding_to_bytes(tiny_models):
    """A value near the middle of two bytes falls to either side with the last bit of a sum; no method is to blame."""
    dense, quick = (teacher(tiny_models / "tiny-llama", quantize).model for quantize in ("none", "int8"))
    assert rounding_error(dense, torch.float32) == torch.finfo(torch.float32).eps
    assert rounding_error(quick, torch.float32) == pytest.approx(1 / 127)


def test_a_gpu_has_no_such_products():
    with pytest.raises(UserError, match="^quantize: `int8` is for CPUs; take `none` or `nf4` on a GPU$"):
        quantize_int8(nn.Linear(2, 2, device="meta"))
