"""The methods by which the rows of a causal model are computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardMethods:
    """How the rows of a causal model are computed.

    scoring, generation: `packed` (token trees), `padded` (a batch of rows padded to one length) or `plain` (each row
    alone through the whole model). direct_head: whether logits are what the output head gives; else the model scales
    or caps them after it. length: tokens of the longest row for which this was checked.
    """

    scoring: str = "packed"
    generation: str = "packed"
    direct_head: bool = True
    length: int = 0
