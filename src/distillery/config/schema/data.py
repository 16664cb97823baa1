"""Sections under `data`: the origin of rows, their columns, and their splits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from distillery.config.schema.base import Fraction, Name, Section


def _known_encoding(encoding: str) -> str:
    try:
        "".encode(encoding)
    except LookupError:
        raise ValueError("must be an encoding that Python knows, such as utf-8, cp1252, cp1251 or utf-16") from None
    return encoding


class SplitShares(Section):
    """Share of the rows of every label that goes to each split, by whole groups; the shares add up to 1."""

    train: Fraction
    """Rows with gold labels to train on."""
    pool: Fraction = 0.0
    """Rows whose labels are hidden: teachers label them."""
    validation: Annotated[float, Field(gt=0, lt=1)]
    """Rows to choose checkpoints, prompts and calibrations on."""
    test: Annotated[float, Field(gt=0, lt=1)]
    """Rows to score on; nothing is trained or chosen on them."""

    @model_validator(mode="after")
    def _adds_up(self):
        total = self.train + self.pool + self.validation + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train + pool + validation + test must add up to 1, not {total:g}")
        return self


class HubSplits(Section):
    """The splits of a hub data set to use, in the hub's notation (`train[:90%]`)."""

    train: str | None = None
    """Rows with gold labels to train on."""
    pool: str | None = None
    """Rows whose labels are hidden: teachers label them."""
    validation: str
    """Rows to choose checkpoints, prompts and calibrations on."""
    test: str
    """Rows to score on."""


class ColumnNames(Section):
    """Names of the columns of the data file."""

    text: str | Annotated[list[str], Field(min_length=1)] = "text"
    """The text. Several columns are joined by a space."""
    label: str | None = "label"
    """The label, or the accepted answers of a `qa` task. null: the rows have none, and all go to the pool."""
    values: Annotated[dict[str | int | float | bool, str], Field(min_length=1)] | None = None
    """Labels of the task by what the file has in their place, such as `{0: down, 1: up}`."""
    options: str | Annotated[list[str], Field(min_length=2)] = "options"
    """The options of a `choice` task: one column with a list, or one column for each option."""
    first: Literal[0, 1, "A"] = 0
    """The value in the column `label` that stands for the first option."""
    id: str | None = "id"
    """A unique name of the row; optional. null: no column, even where one is called `id`."""
    group: str | None = "group"
    """Rows with the same value always go to the same split; optional. null: no column."""
    rationale: str | None = "rationale"
    """An explanation of the label; optional. null: no column."""

    @model_validator(mode="after")
    def _keys_of_values_alike(self):
        is_text = {isinstance(key, str) for key in self.values or {}}
        if len(is_text) > 1:  # DVC sorts the keys
            raise ValueError("the keys of `values` must be all numbers or all text: write the numbers in quotes, too")
        return self


class RowFilter(Section):
    """Which rows of a corpus to use, by columns, by language, by keywords. See also `pseudo_labels` of a phase."""

    keep: dict[str, Annotated[list[str | int | float | bool], Field(min_length=1)]] = {}
    """Values to keep by column, such as `{answer: [accept]}`; rows with another value are not checked either."""
    languages: Annotated[list[str], Field(min_length=1)] | None = None
    """Languages to keep; all when not given."""
    language: str = "language"
    """The column that holds the language."""
    keywords: list[str] = []
    """Words or phrases; a text must hold `min_keywords` of them."""
    min_keywords: Annotated[int, Field(gt=0)] = 1
    """Smallest number of `keywords` in a text."""


class SourceConfig(Section):
    """One named data set with its task and its splits."""

    source: str
    """A .jsonl, .json, .csv, .tsv or .parquet file, also in .gz or .zip, or `hub:owner/name[@revision]`."""
    task: Name
    """What is predicted: the file `tasks/<task>.yaml`."""
    split: SplitShares | None = None
    """Share of the rows in each split."""
    hub_splits: HubSplits | None = None
    """The hub's own splits, instead of `split`."""
    columns: ColumnNames = ColumnNames()
    """Names of the columns of the data file."""
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = None
    """Encoding of the file, such as `cp1252`; when not given, UTF-8 or what its bytes show."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    """The character between two cells of a table; when not given, the one that fits the header and every row."""
    quotes: Literal["doubled", "backslash", "none"] | None = None
    """A quote inside a quoted cell is `doubled` or follows a `backslash`; `none`: quotes are plain characters. When not
    given, the first that fits."""
    header: bool = True
    """The first row of a table names the columns; false: they are called `column1`, `column2`, …"""
    max_empty: Fraction = 0.05
    """Largest share of the rows whose text is empty. They are left out and counted; above it they are an error."""
    hub_config: str | None = None
    """Configuration of the hub data set."""
    hub_split: str = "train"
    """The hub's split that `split` divides."""
    filter: RowFilter | None = None
    """Which rows to use; all when not given."""
    seed: int = 0
    """Seed of the split and of the rows that `limit` draws."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Largest number of rows, drawn at random; all when not given."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Similarity from which two texts are near-duplicates: they go to the same split."""

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
