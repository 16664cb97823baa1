"""The section `augment`: paraphrases and the filters they must pass."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distillery.config.schema.base import TRIMMED_TEXT, Count, Fraction, Name, Positive, Section


class ParaphraseFilter(Section):
    """Conditions that a paraphrase must meet to be trained on."""

    same_label: bool = True
    """The teacher must predict the row's label for the paraphrase, too."""
    same_facts: bool = True
    """Numbers, tickers and direction words of the row's text must stay as they are."""
    max_similarity: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Largest similarity to the row's text, by characters: above it the paraphrase is a copy."""
    min_similarity: Fraction = 0.2
    """Smallest similarity to the row's text: below it the paraphrase is off topic."""


class AugmentConfig(Section):
    """Paraphrases of a source's gold rows. They are the split `augmented` of the source."""

    source: Name
    """The source in `data` whose training rows are paraphrased."""
    teacher: Name
    """The teacher that writes the paraphrases; also those of test rows, see `evaluate.paraphrased_rows`."""
    per_row: Count = 1
    """Paraphrases of each row; 0 for none."""
    instruction: Annotated[str, Field(pattern=TRIMMED_TEXT)] | None = None
    """The turn that requests a paraphrase, in place of that of the task file and of its solved examples."""
    temperature: Positive = 0.7
    """Sampling temperature."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 80
    """Largest length of a paraphrase, in tokens."""
    batch_size: Annotated[int, Field(gt=0)] = 32
    """Rows in one batch of generation."""
    keep: ParaphraseFilter = ParaphraseFilter()
    """Conditions that a paraphrase must meet to be trained on."""
    seed: int = 0
    """Seed of the sampling."""
