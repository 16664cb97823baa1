"""The section `augment`: paraphrases and the filters they must pass."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distillery.config.schema.base import Count, Fraction, Name, Positive, Section


class ParaphraseFilter(Section):
    same_label: bool = True
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.9
    min_similarity: Fraction = 0.2


class AugmentConfig(Section):
    """Paraphrases of a source's gold rows; `per_row: 0` turns them off."""

    source: Name
    teacher: Name
    per_row: Count = 1
    temperature: Positive = 0.7
    max_new_tokens: Annotated[int, Field(gt=0)] = 80
    batch_size: Annotated[int, Field(gt=0)] = 32
    keep: ParaphraseFilter = ParaphraseFilter()
    seed: int = 0
