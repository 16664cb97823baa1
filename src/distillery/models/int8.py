"""Linear layers with products of 8-bit integers, for a model that only predicts on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from distillery.errors import UserError
from distillery.models.layers import output_head
from distillery.models.load import load_model
from distillery.models.memory import release_free_memory

LARGEST = 127  # of a signed byte, so that the range is symmetric
NARROW = {"BF16": "bfloat16", "F16": "float16"}  # number formats of safetensors that float32 holds exactly
TOKENS_AT_ONCE = 256  # whose intermediate results stay in the processor's cache


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [n, d] as int8 [n, d] and the scale of each row [n, 1], float32: x is about their product."""
    x = x.float()
    scale = (
        torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * LARGEST)
        / LARGEST
    )
    return (x / scale).round_().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, a scale an output, and inputs that are rounded to int8, a scale a token.

    Both scales are the largest absolute value over 127 (Dettmers et al. 2022, LLM.int8(), eq. 4 without outliers). Sums
    are exact 32-bit integers. The result has the type of the input.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", weight.t().contiguous())  # [inputs, outputs]
        self.register_buffer("scale", scale[:, 0])
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def quantized_parameters(self) -> int:
        """The number of weights, which are buffers here."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        output = x.new_empty(*x.shape[:-1], self.out_features)
        parts = (y.view(-1, y.shape[-1]).split(TOKENS_AT_ONCE) for y in (x.contiguous(), output))
        for tokens, part in zip(*parts, strict=True):
            rounded, scale = quantize_rows(tokens)
            product = torch._int_mm(rounded, self.weight).float().mul_(scale).mul_(self.scale)
            part.copy_(product if self.bias is None else product.add_(self.bias))
        return output


def quantize_int8(model: nn.Module) -> nn.Module:
    """`model` with an :class:`Int8Linear` in place of each linear layer but the output head, whose logits decide.

    Raises UserError for a model on a GPU, where bfloat16 is fast.
    """
    if next(model.parameters()).device.type != "cpu":
        raise UserError("quantize: `int8` is for CPUs; take `none` or `nf4` on a GPU")
    head = output_head(model)
    # names alone: a list of the layers would hold all dense weights until the last layer is done
    names = [name for name, layer in model.named_modules() if type(layer) is nn.Linear and layer is not head]
    for name in names:
        model.set_submodule(name, Int8Linear(model.get_submodule(name)))
    release_free_memory()
    return model


def load_int8_model(folder: Path, arch: str, *, dtype: str, **options: Any) -> PreTrainedModel:
    """The model in `folder` with int8 layers, see :func:`quantize_int8`; everything else in `dtype`.

    As of :func:`load_model` with `dtype` and then quantized, to the bit. Where the file holds the weights in half as
    many bits they are never all in float32: they are quantized as they are stored, and what stays dense is widened.
    options: of :func:`load_model`.
    """
    stored = stored_dtype(folder) if dtype == "float32" and arch != "classifier" else None  # whose head may be drawn
    model = quantize_int8(load_model(folder, arch, dtype=stored or dtype, **options))
    if stored:
        model.to(torch.float32)
        _compute_buffers(model)
        release_free_memory()
        model.config.dtype = torch.float32
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Set the buffers of `model` that no file holds to their values in float32: some classes compute a scale in the
    format in which the weights are loaded."""
    with init_empty_weights(include_buffers=False):
        computed = type(model)._from_config(model.config, dtype=torch.float32)
    for name, module in computed.named_modules():
        for key in module._non_persistent_buffers_set:
            if (value := module._buffers[key]) is not None:
                model.get_submodule(name)._buffers[key] = value


def stored_dtype(folder: Path) -> str | None:
    """bfloat16 or float16 if the safetensors in `folder` hold all floating-point weights in this format; else None."""
    kinds = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            kinds |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (no mapping)
    floating = {kind for kind in kinds if kind.startswith(("F", "BF"))}
    return NARROW.get(floating.pop()) if len(floating) == 1 else None


def is_int8(model: nn.Module) -> bool:
    """Whether :func:`quantize_int8` changed `model`."""
    return any(isinstance(layer, Int8Linear) for layer in model.modules())


def rounding_error(model: nn.Module, dtype: torch.dtype) -> float:
    """The relative rounding error of the products of `model`, which computes in `dtype`."""
    return max(torch.finfo(dtype).eps, 1 / LARGEST if is_int8(model) else 0.0)
