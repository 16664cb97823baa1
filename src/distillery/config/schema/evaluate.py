"""The sections `evaluate`, `search` and `recipe`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, model_validator

from distillery.config.schema.base import Count, Fraction, Name, Positive, Section


class EvaluateConfig(Section):
    """How students and teachers are scored and compared."""

    headline: Name
    """The student that the report's first sentence is about."""
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    """Resamples of the bootstrap, and of the permutation test."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals."""
    throughput_rows: Annotated[int, Field(gt=0)] = 128
    """Test rows on which the speed is measured."""
    machine_price_per_hour: Positive | None = None
    """US dollars for an hour of the machine of the evaluation; the report then has what predictions cost in dollars."""
    further_sources: bool = True
    """Whether a student is also scored on the other sources of its task that have test rows."""
    rewritten_rows: Count = 64
    """Test rows predicted again after each perturbation of the task file; 0 for none."""
    paraphrased_rows: Count = 0
    """Test rows predicted again after `augment.teacher` has paraphrased them; 0 for none."""
    pretrained_on: dict[Name, list[Name]] = {}
    """Models or teachers, and the sources that they were trained on before: their scores there are no test."""
    confusion: list[Name] = []
    """Students and teachers whose confusion matrices the report shows; the headline, its control and its teacher when
    not given."""
    samples: Annotated[int, Field(gt=0)] = 12
    """Predictions of single test rows shown in the report."""
    seed: int = 0
    """Seed of the bootstrap and of the rows that are drawn."""
    selective_accuracy: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Accuracy wanted of the rows that `distillery predict --abstain` answers; the confidence for it is chosen on the
    validation rows."""
    conformal_coverage: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of rows whose gold label shall be in the prediction set that `distillery predict` then gives; no sets when
    not given."""
    export: list[Name] = []
    """Students that are also exported and scored so: classifiers as ONNX in float32 and int8, which needs the extra
    `export`; causal models as GGUF in float16 and Q8_0."""
    export_tolerance: Fraction = 0.01
    """Accuracy that an export may lose against its student; one that loses more is marked and not used."""


class SearchConfig(Section):
    """Settings for one phase of a student, tried on a share of its gold rows: see `distillery search`."""

    student: Name
    """The student."""
    phase: Annotated[int, Field(gt=0)] = 1
    """Number of the phase, counted from 1."""
    trials: Annotated[int, Field(gt=0)] = 25
    """Number of settings to try."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Share of the phase's gold rows that is used."""
    folds: Annotated[int, Field(ge=2)] = 3
    """Folds of the cross-validation."""
    learning_rate: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """Lowest and highest learning rate; drawn log-uniformly."""
    choices: dict[
        Literal["batch_size", "temperature", "weight_decay", "warmup", "epochs", "steps", "schedule", "loss"],
        Annotated[list[Any], Field(min_length=1)],
    ] = {}
    """Values to draw from, for other keys of the phase."""
    sampler: Literal["random", "tpe"] = "random"
    """How settings are proposed: `tpe` prefers settings near those that scored well."""
    seed: int = 0
    """Seed of the settings, the rows and the training."""

    @model_validator(mode="after")
    def _something_to_search(self):
        if not self.learning_rate and not self.choices:
            raise ValueError("nothing to search: give `learning_rate` or `choices`")
        return self


class PublishedScores(Section):
    """Figures of a published system, for one student or teacher of this file."""

    model: str
    """The student or teacher that stands for it."""
    scores: Annotated[dict[str, float], Field(min_length=1)]
    """The published figures by metric."""
    split: Literal["validation", "test"] | None = None
    """The source's split that they are of; none where it does not say."""
    place: str = ""
    """Where the source has them, such as `table 2`."""
    note: str = ""
    """Anything a reader must know to compare them."""


class PublishedSetting(Section):
    """A setting of a published system, for one key of this file."""

    setting: str
    """The key; `*` in it is any name or position, and `tasks.<name>` starts a key of a task file."""
    source: JsonValue
    """The source's value as this file would have it; of a section the list of its names. null: the source has none."""
    place: str
    """Where the source names it, such as `section 3.2`."""


class RecipeConfig(Section):
    """What a recipe reproduces."""

    source: str
    """The published system."""
    published: list[PublishedScores] = []
    """Its figures."""
    settings: list[PublishedSetting] = []
    """Its settings, for the full scale: those that this file does not have are also keys of `differences`, or of
    `guesses` where the source contradicts itself."""
    guesses: dict[str, str] = {}
    """By setting of this file (`students.*.phases.*.epochs`; `*` is any name or position): what the source leaves open
    or contradicts, and what was chosen."""
    differences: dict[str, str] = {}
    """By setting of this file, as in `guesses`: what the source has there, and what this file has."""
    needs: str = ""
    """Hardware and time to expect."""
