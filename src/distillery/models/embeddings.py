"""Sentence embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModel

from distillery.models.devices import default_device
from distillery.models.load import load_tokenizer


@torch.no_grad()
def embed_texts(folder: Path, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
    """Unit vectors [n, d] of `texts`, float32: the encoder's last hidden states, averaged over the tokens of a text.

    folder: holds the encoder and its tokenizer. A text is cut at 256 tokens. Raises UserError without a tokenizer.
    """
    tokenizer, model = load_tokenizer(folder), AutoModel.from_pretrained(folder).eval().to(default_device())
    embeddings = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), padding=True, truncation=True, max_length=256, return_tensors="pt"
        ).to(model.device)
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        embeddings.append(nn.functional.normalize(mean.float(), dim=-1).cpu().numpy())
    return np.concatenate(embeddings) if embeddings else np.zeros((0, model.config.hidden_size), dtype=np.float32)
