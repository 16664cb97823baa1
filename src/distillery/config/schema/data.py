"""Sections under `data`: the origin of rows, their columns, and their splits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from distillery.config.schema.base import SPLITS, Count, Fraction, Name, Section


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


class OwnSplits(Section):
    """A file for each split, or a split of the hub data set `source` in the hub's notation (`train[:90%]`)."""

    train: str | None = None
    """Rows with gold labels to train on."""
    pool: str | None = None
    """Rows whose labels are hidden: teachers label them. A file may leave them empty."""
    validation: str | None = None
    """Rows to choose checkpoints, prompts and calibrations on; when not given, `validation_share` of `train`."""
    test: str | None = None
    """Rows to score on. A source with these alone is a benchmark: it scores every student of its task."""

    @model_validator(mode="after")
    def _test_or_pool_alone(self):
        if not self.test and (self.train or self.validation or not self.pool):
            raise ValueError("needs `test`, or `pool` alone")
        return self


class ColumnNames(Section):
    """Names of the columns of the data file; inside objects and lists of JSON the path, such as `data.text`."""

    text: str | Annotated[list[str], Field(min_length=1)] = "text"
    """The text. Several columns are joined by a space."""
    label: str | None = "label"
    """The label; of a `multilabel` task the labels, as a list or as one text; of a `qa` task the accepted answers.
    null: the rows have none, and all go to the pool."""
    values: Annotated[dict[str | int | float | bool, str], Field(min_length=1)] | None = None
    """Labels of the task by what the file has in their place, such as `{0: down, 1: up}`."""
    label_separator: Annotated[str, Field(min_length=1)] | None = None
    """The text between two labels of a `multilabel` row, such as `;`. When not given, the one of `;`, `|`, `,`, line
    break, tab and space that fits the column; a list needs none."""
    label_columns: Annotated[list[str], Field(min_length=2)] | None = None
    """Of a `multilabel` task, a column of 1 and 0 for each label, in place of `label`. A column is called as its label,
    or `values` names it."""
    options: str | Annotated[list[str], Field(min_length=2)] = "options"
    """The options of a `choice` task: one column with a list, or one column for each option."""
    first: Literal[0, 1, "A"] = 0
    """The value in the column `label` that stands for the first option."""
    shuffle_options: bool = True
    """Shuffle the options of each row, so that positions hold no information; false keeps the order of the file."""
    max_options: Annotated[int, Field(ge=2)] | None = None
    """Largest number of options: the right one and others drawn at random; all when not given."""
    id: str | None = "id"
    """A unique name of the row; optional. null: no column, even where one is called `id`."""
    group: str | None = "group"
    """Rows with the same value always go to the same split; optional. null: no column."""
    rationale: str | None = "rationale"
    """An explanation of the label; optional. null: no column."""

    @property
    def gold(self) -> list[str]:
        """The columns of the file that hold labels."""
        return self.label_columns or ([self.label] if self.label else [])

    @model_validator(mode="after")
    def _one_place_of_labels(self):
        if self.label_columns and {"label", "label_separator"} & self.model_fields_set:
            raise ValueError("`label_columns` stands in place of `label` and `label_separator`: take them away")
        return self

    @model_validator(mode="after")
    def _keys_of_values_alike(self):
        is_text = {isinstance(key, str) for key in self.values or {}}
        if len(is_text) > 1:  # DVC sorts the keys
            raise ValueError("the keys of `values` must be all numbers or all text: write the numbers in quotes, too")
        return self

    @model_validator(mode="after")
    def _right_option_is_known(self):
        if self.max_options and self.label is None:
            raise ValueError("`max_options` keeps the right option, and `label: null` names none")
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
    expand_keywords: Count = 0
    """Largest number of words to add to `keywords`, see `expand_by`."""
    expand_by: Literal["likelihood", "embeddings"] = "likelihood"
    """Which words `expand_keywords` adds: `likelihood`: those that most distinguish texts with a keyword from others;
    `embeddings`: those of the texts whose vectors are nearest to that of a keyword (cosine)."""
    embeddings: Name | None = None
    """The encoder in `models` whose vectors `expand_by: embeddings` compares."""
    theme: str | None = None
    """The column, such as `theme`, for whose values the audit counts rows before and after the filter."""
    date: str | None = None
    """The column with the date, for the first and the last one of each theme."""

    @model_validator(mode="after")
    def _something_to_expand(self):
        if self.expand_keywords and not self.keywords:
            raise ValueError("`expand_keywords` starts from `keywords`, and there are none")
        if (self.expand_by == "embeddings") != (self.embeddings is not None):
            raise ValueError("`expand_by: embeddings` and `embeddings` (an encoder of `models`) go together")
        if self.expand_by == "embeddings" and not self.expand_keywords:
            raise ValueError("`expand_by: embeddings` adds no word: set `expand_keywords`, the largest number of them")
        return self


class SourceConfig(Section):
    """One named data set with its task and its splits."""

    source: str | None = None
    """A .jsonl, .json, .csv, .tsv, .parquet or .xlsx file, or .txt with a `delimiter`, also in .gz or .zip; several
    by `*` and `?`, such as `data/part-*.csv`; a folder of text files, with a folder for each label; or
    `hub:owner/name[@revision]`. Not with files in `splits`."""
    task: Name
    """What is predicted: the file `tasks/<task>.yaml`."""
    split: SplitShares | None = None
    """Share of the rows in each split."""
    splits: OwnSplits | None = None
    """Own splits, instead of `split`: a file for each, or the hub's."""
    split_column: str | None = None
    """Own splits, instead of `split`: the column that holds `train`, `validation`, `test` or `pool`."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the rows of `train` that become validation rows, by whole groups, where own splits have none."""
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
    remove_punctuation: bool = False
    """Take punctuation and special characters out of the texts: letters, digits and single spaces stay."""
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
    """Number of groups to draw at random, a row without a group being one; all when not given."""
    near_duplicate: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Similarity from which two texts are near-duplicates: they go to the same split."""
    drop_leaks: bool = False
    """Leave out each row that repeats, to the letter or nearly, a validation or test row of another source of the task.
    Rows that own splits name as validation or test stay."""

    @model_validator(mode="after")
    def _one_way_to_split(self):
        ways = [self.split, self.splits, self.split_column]
        if self.columns.label is None:
            if any(ways):
                raise ValueError("rows without label are all pool; take `split`, `splits` and `split_column` away")
        elif sum(way is not None for way in ways) != 1:
            raise ValueError("needs exactly one of `split` (shares), `splits` (a file or split of the hub for each) or "
                             "`split_column`")  # fmt: skip
        if self.source is None and self.splits is None:
            raise ValueError("needs `source`, or `splits` with a file for each split")
        if self.splits and self.source and not self.is_on_hub:
            raise ValueError("`splits` names the files: take `source` away, or write `source: hub:owner/name`")
        return self

    @property
    def is_on_hub(self) -> bool:
        return (self.source or "").startswith("hub:")

    @property
    def files(self) -> dict[str, str]:
        """The files of the source by split, or its one file under `source`; empty for a data set of the hub."""
        if self.is_on_hub:
            return {}
        return {"source": self.source} if self.source else self.own_splits

    @property
    def own_splits(self) -> dict[str, str]:
        """The files or splits of the hub by split, in the order of `SPLITS`; empty where `splits` is not given."""
        values = {split: getattr(self.splits, split, None) for split in SPLITS}
        return {split: value for split, value in values.items() if value}

    @property
    def origin(self) -> str:
        """The file, the files or the data set of the hub, for readers."""
        return self.source or ", ".join(self.own_splits.values())

    def holds(self, split: str) -> bool:
        """Whether any row goes to `split`; with `split_column`, whether it may."""
        if self.columns.label is None:
            return split == "pool"
        if self.split_column:
            return True
        if self.splits and split == "validation":
            return bool(self.splits.validation or self.splits.train)
        return bool(getattr(self.split or self.splits, split))

    @property
    def held_splits(self) -> list[str]:
        """The splits that rows go to, or with `split_column` may go to, in the order of `SPLITS`."""
        return [split for split in SPLITS if self.holds(split)]
