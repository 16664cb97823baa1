"""Rows in batches of about one length. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches_by_length(rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches of `batch_size`, the shortest rows first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
