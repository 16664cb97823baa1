"""Linear layers with products of 8-bit integers, for a model that only predicts on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillery.errors import UserError
from distillery.models.layers import output_head

LARGEST = 127  # of a signed byte, so that the range is symmetric
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
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            model.set_submodule(name, Int8Linear(layer))
    return model


def is_int8(model: nn.Module) -> bool:
    """Whether :func:`quantize_int8` changed `model`."""
    return any(isinstance(layer, Int8Linear) for layer in model.modules())


def rounding_error(model: nn.Module, dtype: torch.dtype) -> float:
    """The relative rounding error of the products of `model`, which computes in `dtype`."""
    return max(torch.finfo(dtype).eps, 1 / LARGEST if is_int8(model) else 0.0)
