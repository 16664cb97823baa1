"""Products of 8-bit integers: their rounding, and the models that predict with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from distillery.config.schema import ModelConfig, TeacherConfig
from distillery.errors import UserError
from distillery.models.int8 import Int8Linear, quantize_int8, quantize_rows, rounding_error
from distillery.models.layers import count_parameters, output_head
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
