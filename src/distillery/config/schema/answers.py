"""Section `answers` of a teacher: files with what a language model answered elsewhere."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import Section


class AnswerColumns(Section):
    """Names of the columns of an answer file."""

    id: str | None = None
    """The row's id, to find the row by; or `text`."""
    text: str | None = "text"
    """The row's text, to find the row by; or `id`."""
    label: str | None = None
    """The label; or `probabilities` or `answer`."""
    probabilities: dict[str, str] | None = None
    """For each label of the task the column that holds its probability; or `label` or `answer`."""
    explanation: str | None = None
    """The explanation of the label. Not every line or file has one."""
    paraphrase: str | None = None
    """A paraphrase of the row `<id>`, in a line with the id `<id>#<n>` (n from 0). Not every line or file has one."""
    answer: str | None = None
    """Label and explanation in one text, as a language model wrote them; or `label` or `probabilities`."""

    @model_validator(mode="after")
    def _fits(self):
        if (self.id is None) == (self.text is None):
            raise ValueError("needs exactly one of `id` or `text`, by which answers find their rows (`text: null`)")
        if self.paraphrase and not self.id:
            raise ValueError("`paraphrase` needs `id`, by which a paraphrase finds its row")
        if sum(column is not None for column in (self.label, self.probabilities, self.answer)) != 1:
            raise ValueError("needs exactly one of `label`, `probabilities` or `answer`")
        return self

    @property
    def names(self) -> list[str]:
        """Every column that each file must have."""
        columns = [self.id, self.text, self.label, *(self.probabilities or {}).values(), self.answer]
        return [column for column in columns if column is not None]

    @property
    def optional_names(self) -> list[str]:
        """Every column that one of the files must have."""
        return [column for column in (self.explanation, self.paraphrase) if column is not None]


class AnswerFilesConfig(Section):
    """Answers of an external language model from .csv, .tsv, .jsonl or .parquet files."""

    files: Annotated[list[str], Field(min_length=1)]
    """The files."""
    columns: AnswerColumns
    """Names of their columns."""
    repeats: Literal["drop", "keep"] = "drop"
    """`drop` leaves out an answer with the explanation of the row before although the text is another one: the trace of
    a script that repeated its last answer when a request failed."""
