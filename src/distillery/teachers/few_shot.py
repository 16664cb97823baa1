"""Gold rows as solved examples in a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from distillery.models.embeddings import embed_texts
from distillery.tasks.schema import FewShotExample


class GoldExamples:
    """Gold rows as solved examples: the same `n` for every row, labels taking turns, or for each the `n` most similar.

    gold: text, label, group of training rows. encoder: the folder of the model whose embeddings tell similarity; the
    most similar example stands last. A row never sees an example of its own group.
    """

    def __init__(self, gold: pd.DataFrame, n: int, encoder: Path | None = None, seed: int = 0):
        gold = gold.sample(frac=1, random_state=seed)
        turn = gold.groupby("label").cumcount()
        self.gold = gold.iloc[np.lexsort([gold["label"], turn])].reset_index(drop=True)
        self.n, self.encoder = n, encoder
        self.shots = [
            FewShotExample(text=t, label=y) for t, y in zip(self.gold["text"], self.gold["label"], strict=True)
        ]
        self.vectors = embed_texts(encoder, self.gold["text"].tolist()) if encoder else None

    def choose(self, texts: Sequence[str], groups: Sequence[str | None]) -> list[tuple[int, ...]]:
        """For each text the positions in `gold` of its examples, in the order in which they are shown."""
        own = [self.gold["group"].to_numpy() == group for group in groups]
        if self.encoder is None:
            return [tuple(np.flatnonzero(~mine)[: self.n].tolist()) for mine in own]
        likeness = embed_texts(self.encoder, list(texts)) @ self.vectors.T
        likeness[np.stack(own)] = -np.inf
        order = np.argsort(-likeness, axis=1, kind="stable")[:, : self.n]
        return [tuple(i for i in row[::-1].tolist() if not mine[i]) for row, mine in zip(order, own, strict=True)]
