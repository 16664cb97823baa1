"""Sections under `data`: where rows come from, which columns count, and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import Fraction, Name, Section


class SplitShares(Section):
    """Share of the rows of every label that goes to each split, by whole groups; the shares add up to 1."""

    train: Fraction
    pool: Fraction = 0.0
    validation: Annotated[float, Field(gt=0, lt=1)]
    test: Annotated[float, Field(gt=0, lt=1)]

    @model_validator(mode="after")
    def _adds_up(self):
        total = self.train + self.pool + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + pool + validation + test must add up to 1, not {total:g}")
        return self


class HubSplits(Section):
    """Which of a hub data set's own splits plays which part, in the hub's words (`train[:90%]`)."""

    train: str | None = None
    pool: str | None = None
    validation: str
    test: str


class ColumnNames(Section):
    """Which column of the file holds what.

    text: several columns are joined by a space.  label: null says that the rows have none, and are all pool.
    options: of a `choice` task, a column with a list or one column an option.  first: what its `label` calls the first.
    """

    text: str | Annotated[list[str], Field(min_length=1)] = "text"
    label: str | None = "label"
    options: str | Annotated[list[str], Field(min_length=2)] = "options"
    first: Literal[0, 1, "A"] = 0
    id: str = "id"
    group: str = "group"
    rationale: str = "rationale"


class RowFilter(Section):
    """Which rows of a corpus are to the point: by language, then by words; the next step is a phase's `pseudo_labels`.

    languages: what the column `language` may hold.
    keywords: words or phrases, `min_keywords` of which a text must hold.
    """

    languages: Annotated[list[str], Field(min_length=1)] | None = None
    language: str = "language"
    keywords: list[str] = []
    min_keywords: Annotated[int, Field(gt=0)] = 1


class SourceConfig(Section):
    """One named data set. `source` is a .jsonl, .csv, .tsv or .parquet file, or `hub:owner/name[@revision]`."""

    source: str
    task: Name
    split: SplitShares | None = None
    hub_splits: HubSplits | None = None
    columns: ColumnNames = ColumnNames()
    hub_config: str | None = None
    hub_split: str = "train"
    filter: RowFilter | None = None
    seed: int = 0
    limit: Annotated[int, Field(gt=0)] | None = None
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.85

    @model_validator(mode="after")
    def _one_way_to_split(self):
        if self.columns.label is None:
            if self.split or self.hub_splits:
                raise ValueError("rows without label are all pool; take `split` and `hub_splits` away")
        elif (self.split is None) == (self.hub_splits is None):
            raise ValueError("needs exactly one of `split` (shares) or `hub_splits` (the hub's own splits)")
        if self.hub_splits and not self.source.startswith("hub:"):
            raise ValueError("`hub_splits` is for a source hub:owner/name; a file needs `split`")
        return self

    def holds(self, split: str) -> bool:
        """Whether any row goes to `split`."""
        if self.columns.label is None:
            return split == "pool"
        return bool(getattr(self.split or self.hub_splits, split))
