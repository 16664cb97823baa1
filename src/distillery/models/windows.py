"""Long texts in overlapping windows, each of which a classifier reads by itself; their logits are pooled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distillery.config.schema import LongTextsConfig
from distillery.errors import UserError
from distillery.models.scoring import ModelOutput, classifier_output


@dataclass(frozen=True)
class Windows:
    """Windows of a text. length: tokens of each, its special tokens among them. count: the most that a text has.

    stride: tokens from the start of one to the start of the next. pool: `mean` or `max`. before, after: special tokens
    at the two ends of each window, as at those of a text.
    """

    length: int
    stride: int
    count: int
    pool: str
    before: int
    after: int

    @property
    def reach(self) -> int:
        """Tokens of the longest text that is read whole, special tokens among them."""
        return self.length + (self.count - 1) * self.stride

    def split(self, ids: Sequence[int]) -> list[list[int]]:
        """The windows of a text `ids` of at most `reach` tokens: one if it fits, else as many as reach its end."""
        ids = list(ids)
        end = len(ids) - self.after
        first, body, last = ids[: self.before], ids[self.before : end], ids[end:]
        room = self.length - self.before - self.after
        starts = range(0, max(1, len(body) - room + self.stride), self.stride)
        return [[*first, *body[start : start + room], *last] for start in starts]

    def pool_logits(self, logits: Tensor, counts: Sequence[int]) -> Tensor:
        """[texts, labels] from `logits` [windows, labels], of which each text has the next one of `counts`."""
        parts = logits.split(list(counts))
        return torch.stack([part.mean(0) if self.pool == "mean" else part.amax(0) for part in parts])


def build_windows(
    place: str, long_texts: LongTextsConfig | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Windows | None:
    """The windows of `max_length` tokens that `long_texts` describes; None without it.

    Raises UserError, whose line begins with `place`, when tokens between two windows would be left out.
    """
    if long_texts is None:
        return None
    none, one = (tokenizer(text)["input_ids"] for text in ("", "a"))
    before = next((i for i, (a, b) in enumerate(zip(none, one, strict=False)) if a != b), len(none))
    room = max_length - len(none)
    stride = long_texts.stride or max(1, room // 2)
    if stride > room:
        raise UserError(f"{place}.long_texts.stride: {stride} is too large: a window holds {room} tokens of a text")
    return Windows(max_length, stride, long_texts.windows, long_texts.pool, before, len(none) - before)


def store_windows(model: PreTrainedModel, windows: Windows | None) -> None:
    """Note in the config of `model`, which is saved with it, how it reads long texts."""
    if windows is not None:
        model.config.long_texts = asdict(windows)
    elif hasattr(model.config, "long_texts"):  # of the model that it starts from
        del model.config.long_texts


def stored_windows(model: PreTrainedModel) -> Windows | None:
    """How `model` reads long texts, by its config; None where it cuts them."""
    values: dict[str, Any] | None = getattr(model.config, "long_texts", None)
    return Windows(**values) if values else None


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, windows: Windows | None
) -> list[list[int]]:
    """Token ids of `texts` for a classifier, at most `max_length` or as many as `windows` reach."""
    longest = windows.reach if windows else max_length
    return tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]


def windowed_output(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int],
    activation_maps: bool,
    windows: Windows | None,
) -> ModelOutput:
    """As :func:`classifier_output`; with `windows` the label logits alone, pooled over the windows of each row."""
    if windows is None:
        return classifier_output(model, tokenizer, ids, layers, activation_maps)
    parts = [windows.split(row) for row in ids]
    logits = classifier_output(model, tokenizer, [part for row in parts for part in row], (), False).label_logits
    return ModelOutput(windows.pool_logits(logits, [len(row) for row in parts]))
