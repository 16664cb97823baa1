"""The order of rows in an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

BATCHES_PER_POOL = 16  # batches drawn together and sorted by length, so that rows of one batch need little padding


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Row order of an epoch, a pure function of (seed, epoch): a resumed run continues with the rows that come next.

    lengths: tokens of each row. batch: rows of a batch. order: `random` draws batches of similar length; `length` goes
    from short to long; `confidence` goes from low to high `entropy` of the teachers' distribution.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, order: str = "random", entropy: Any = None):
        self.lengths, self.batch, self.seed, self.order, self.entropy = lengths, batch, seed, order, entropy
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.order != "random":
            key = self.lengths if self.order == "length" else self.entropy
            return iter(sorted(range(len(self)), key=lambda i: (key[i], i)))
        rng = np.random.default_rng([self.seed, self.epoch])
        rows = rng.permutation(len(self)).tolist()
        pool = self.batch * BATCHES_PER_POOL
        rows = [i for a in range(0, len(rows), pool) for i in sorted(rows[a : a + pool], key=self.lengths.__getitem__)]
        full = len(rows) // self.batch
        batches = [rows[k * self.batch : (k + 1) * self.batch] for k in range(full)]
        return iter([i for k in rng.permutation(full) for i in batches[k]] + rows[full * self.batch :])


class BalancedSampler(LengthGroupedSampler):
    """As the order `random` of :class:`LengthGroupedSampler`, with as many rows of each label in every batch.

    labels: the label of each row, an index. The counts of two labels in a batch differ by one at most. An epoch has as
    many rows as there are: of a frequent label a part, drawn anew in each epoch, of a rare one each row several times.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, labels: Sequence[int]):
        super().__init__(lengths, batch, seed)
        labels = np.asarray(labels)
        self.rows_of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        n, count = len(self), len(self.rows_of_label)
        per_label = -(-n // count)
        pool = max(1, self.batch * BATCHES_PER_POOL // count)
        columns = []
        for rows in (self.rows_of_label[k] for k in rng.permutation(count)):  # the remainder goes to others each time
            drawn = np.concatenate([rng.permutation(rows) for _ in range(-(-per_label // len(rows)))])[:per_label]
            drawn = drawn.tolist()
            pools = (drawn[start : start + pool] for start in range(0, per_label, pool))
            columns.append([i for rows in pools for i in sorted(rows, key=self.lengths.__getitem__)])
        rows = [i for row in zip(*columns, strict=True) for i in row][:n]
        full = n // self.batch
        order = [i for k in rng.permutation(full) for i in rows[k * self.batch : (k + 1) * self.batch]]
        return iter(order + rows[full * self.batch :])
