"""Words as vectors of an encoder. A stage depends on this module only where a filter needs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distillery.config.schema import ModelConfig
from distillery.models.embeddings import embed_texts
from distillery.models.fetch import fetch_model


def embed_words(name: str, spec: ModelConfig, words: Sequence[str]) -> np.ndarray:
    """Unit vectors [n, d] of `words` by the encoder `name`; see :func:`distillery.models.embeddings.embed_texts`.

    Raises UserError when the encoder cannot be fetched.
    """
    return embed_texts(fetch_model(name, spec), words)
