"""The sections `evaluate`, `search` and `recipe`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import Count, Name, Positive, Section


class EvaluateConfig(Section):
    headline: Name  # the student that the report's first sentence is about
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    throughput_rows: Annotated[int, Field(gt=0)] = 128
    rewritten_rows: Count = 64  # test rows asked again with other names, amounts or spelling; 0: none
    paraphrased_rows: Count = 0  # and test rows that `augment.teacher` puts into other words
    pretrained_on: dict[Name, list[Name]] = {}  # who had learned from a source before: no test of them
    samples: Annotated[int, Field(gt=0)] = 12
    seed: int = 0


class SearchConfig(Section):
    """Random settings for one phase of a student, tried on a share of its gold rows: see `distillery search`.

    phase: counted from 1.  learning_rate: lowest and highest.  choices: values for other keys of the phase.
    """

    student: Name
    phase: Annotated[int, Field(gt=0)] = 1
    trials: Annotated[int, Field(gt=0)] = 25
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    folds: Annotated[int, Field(ge=2)] = 3
    learning_rate: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    choices: dict[
        Literal["batch_size", "temperature", "weight_decay", "warmup", "epochs", "steps", "schedule", "loss"],
        Annotated[list[Any], Field(min_length=1)],
    ] = {}
    seed: int = 0

    @model_validator(mode="after")
    def _something_to_search(self):
        if not self.learning_rate and not self.choices:
            raise ValueError("nothing to search: give `learning_rate` or `choices`")
        return self


class PublishedScores(Section):
    """Figures of a published system, for one student or teacher as it is called here."""

    model: str
    scores: Annotated[dict[str, float], Field(min_length=1)]
    note: str = ""


class RecipeConfig(Section):
    """What a recipe reproduces. guesses: where the source is silent or contradicts itself.  differences: what is not
    as in the source."""

    source: str
    published: list[PublishedScores] = []
    guesses: list[str] = []
    differences: list[str] = []
    needs: str = ""  # hardware and time to expect
