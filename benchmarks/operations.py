"""Count the operations of matrix products: 2 · m · n · k for a product [m, k] @ [k, n].

`FlopCounterMode` of torch counts by the shapes of the products that it meets. It does not look inside the attention
kernel of a CPU, nor inside the 4-bit products of bitsandbytes; their formulas are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

Shape = Sequence[int]


def attention_operations(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of the kernel for CPUs: [b, heads, s, size] each; causal or not, it is counted whole, as torch does elsewhere."""
    return sdpa_flop_count(query, key, value)


def attention_backward_operations(gradient: Shape, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Of the backward pass of :func:`attention_operations`."""
    return sdpa_backward_flop_count(gradient, query, key, value)


def product_operations_4bit(inputs: Shape, _packed: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Of [..., k] inputs and a weight [n, k] in 4 bits; dequantizing it is no product."""
    return 2 * int(np.prod(inputs)) * weight[0]


def formulas() -> dict[Any, Callable[..., int]]:
    """Operation -> its count by shapes, for those that torch does not count."""
    import bitsandbytes  # noqa: F401  it registers its operations

    return {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_operations,
        torch.ops.bitsandbytes.gemm_4bit: product_operations_4bit,
        torch.ops.bitsandbytes.gemv_4bit: product_operations_4bit,
    }


def count_operations() -> FlopCounterMode:
    """A context that counts, its backward passes too; `get_total_flops()` gives the operations so far."""
    return FlopCounterMode(display=False, custom_mapping=formulas())


class LinearCount:
    """The operations of calls of one kind, as a linear function of numbers that are known before the call.

    Two calls of a model differ in their tokens, rows and lengths alone, and the operations are a sum of products of
    these, with factors that the model sets. So calls that were counted give the operations of any other call whose
    numbers are a linear combination of their numbers. This is not taken on trust: :meth:`estimate` gives None until
    it was right `CONFIRMATIONS` times, to the ninth digit, about a call that was then counted.
    """

    CONFIRMATIONS = 3

    def __init__(self) -> None:
        self.numbers: list[list[float]] = []
        self.operations: list[float] = []
        self.confirmed = 0

    def _solve(self, numbers: Sequence[float]) -> int | None:
        """The operations that counted calls give; None where `numbers` are no linear combination of these."""
        if not self.numbers:
            return None
        known, new = np.array(self.numbers, float), np.array(numbers, float)
        scale = np.maximum(known.max(0), 1)
        weights, *_ = np.linalg.lstsq((known / scale).T, new / scale, rcond=1e-9)
        if not np.allclose(weights @ (known / scale), new / scale, rtol=0, atol=1e-9):
            return None
        return round(float(weights @ np.array(self.operations)))

    def estimate(self, numbers: Sequence[float]) -> int | None:
        """The operations of a call, None where it must be counted."""
        return self._solve(numbers) if self.confirmed >= self.CONFIRMATIONS else None

    def add(self, numbers: Sequence[float], operations: int) -> None:
        """Learn from a call that was counted."""
        estimate = self._solve(numbers)
        if estimate is not None:
            # the solution of the linear equations is rounded
            right = abs(estimate - operations) <= 1e-9 * operations
            self.confirmed = self.confirmed + 1 if right else 0
            if right:
                return
        self.numbers.append(list(numbers))
        self.operations.append(operations)
