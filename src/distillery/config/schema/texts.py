"""The section `long_texts` of students and teachers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distillery.config.schema.base import Section


class LongTextsConfig(Section):
    """How a classifier reads texts longer than `max_length`: in overlapping windows, whose logits are pooled."""

    windows: Annotated[int, Field(ge=2)] = 8
    """Largest number of windows of a text; what lies behind the last of them is cut."""
    stride: Annotated[int, Field(gt=0)] | None = None
    """Tokens from the start of one window to the start of the next; half of a window when not given."""
    pool: Literal["mean", "max"] = "mean"
    """The logits of a text: for each label the mean over its windows, or the largest."""
