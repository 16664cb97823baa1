"""Try a model out without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, of which nothing stays: neither drawn random numbers nor a module's mode.

    The cache of autocast is also on or off again as it was, which a caller may change within the context.
    """
    modes = [(module, module.training) for module in model.modules()]
    cache_enabled = torch.is_autocast_cache_enabled()
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        torch.set_autocast_cache_enabled(cache_enabled)
        for module, training in modes:
            module.training = training
