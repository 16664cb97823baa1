"""LoRA layers of peft with less work in a step."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.bnb import Linear4bit
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class LowRankScaling:
    """A layer of peft that multiplies the r numbers of a token by the adapter's scaling, instead of all its outputs.

    For a scaling that is a power of two, such as the usual 2, outputs and gradients are equal to the bit: doubling
    changes no digit of a product. The copy that peft makes of the outputs of a 4-bit layer is left out, too.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = self.active_adapters
        if self.disable_adapters or self.merged or kwargs or len(adapters) != 1 or adapters[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        name = adapters[0]
        outputs = self.base_layer(x, *args)  # first, as in peft: the order of these decides that of gradients' sums
        low_rank = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
        return outputs + self.lora_B[name](low_rank)


class ScaledLinear(LowRankScaling, Linear):
    """Of a linear layer."""


class ScaledLinear4bit(LowRankScaling, Linear4bit):
    """Of a linear layer in 4 bits."""


SCALED = {Linear: ScaledLinear, Linear4bit: ScaledLinear4bit}


def scale_low_rank(module: nn.Module) -> None:
    """Let the layer `module` of peft work as :class:`LowRankScaling`, if it is of such a kind."""
    if type(module) in SCALED:
        module.__class__ = SCALED[type(module)]
