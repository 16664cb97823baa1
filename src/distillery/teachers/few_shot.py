"""Gold rows as solved examples in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.models.embeddings import embed_texts
from distillery.tasks.schema import FewShotExample


class GoldExamples:
    """Gold rows as solved examples: the same `n` for every row, labels taking turns, or the `n` most similar to each.

    gold: text, label, group of training rows. encoder: folder of the model whose embeddings measure similarity; None
    gives every row the same examples. The most similar example stands last. A row never gets one of its own group.
    """

    def __init__(self, gold: pd.DataFrame, n: int, encoder: Path | None = None, seed: int = 0):
        gold = gold.sample(frac=1, random_state=seed)
        turn = gold.groupby("label").cumcount()
        self.gold = gold.iloc[np.lexsort([gold["label"], turn])].reset_index(drop=True)
        self.n, self.encoder = n, encoder
        self.examples = [
            FewShotExample(text=text, label=label)
            for text, label in zip(self.gold["text"], self.gold["label"], strict=True)
        ]

    @cached_property
    def embeddings(self) -> np.ndarray:
        """Unit vectors of the gold texts [len(gold), d]."""
        return embed_texts(self.encoder, self.gold["text"].tolist())

    def choose(self, texts: Sequence[str], groups: Sequence[str | None]) -> list[tuple[int, ...]]:
        """For each text the positions in `gold` of its examples, in the order in which they are shown."""
        same_group = [self.gold["group"].to_numpy() == group for group in groups]
        if self.encoder is None:
            return [tuple(np.flatnonzero(~excluded)[: self.n].tolist()) for excluded in same_group]
        similarity = embed_texts(self.encoder, list(texts)) @ self.embeddings.T
        similarity[np.stack(same_group)] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.n]
        return [
            tuple(i for i in nearest[::-1].tolist() if not excluded[i])
            for nearest, excluded in zip(order, same_group, strict=True)
        ]

    def at(self, positions: Sequence[int]) -> list[FewShotExample]:
        """The examples at `positions` of `gold`."""
        return [self.examples[i] for i in positions]
