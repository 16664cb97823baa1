"""The schema of `params.yaml` of this study, in the terms of the experiment's own `params.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from distillery.config.load import validate_section
from distillery.config.schema import Count, ModelConfig, Name, Section, SplitShares, StudentConfig
from distillery.files import read_yaml


class PoolSettings(Section):
    """The unlabelled texts that teachers label, each a pool that a phase can name."""

    headlines: Count = 0
    """`headlines/pool`: number of headlines, those nearest to a training sentence."""
    finance: bool = False
    """`finance/pool`: the texts of this project's finance corpus, without their labels."""
    written: bool = False
    """`written/pool`: the texts that a language model wrote for the task, without their labels."""
    spliced: Count = 0
    """`spliced/pool`: sentences made of two training sentences, for each sentence that can be cut."""


class TeacherSettings(StudentConfig):
    """A teacher is tuned in phases like a student, on gold labels, once without each fold of the training rows."""

    folds: Annotated[int, Field(ge=2)]
    """Folds of the training rows."""


class StudySettings(Section):
    """What is trained, on which rows. Phases name `50agree/train`, `allagree/train` and the pools."""

    split: SplitShares
    """Shares of the rows of 50-agree in each split."""
    pools: PoolSettings = PoolSettings()
    """The unlabelled texts."""
    models: dict[Name, ModelConfig]
    """Where the models come from."""
    teachers: dict[Name, TeacherSettings] = {}
    """Cross-fitted teachers."""
    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]
    """Trained anew for every seed, on PhraseBank."""
    transfer: dict[Name, StudentConfig] = {}
    """Trained once on `finance/train`, all rows of this project's finance corpus with their labels."""
    transfer_runs: list[str] = []
    """Finished students of the main experiment, each a folder in `runs/`: `<student>-<seed>`."""

    @model_validator(mode="after")
    def _names_fit(self):
        for name, spec in (self.students | self.teachers | self.transfer).items():
            references = [("models", spec.model), ("students", spec.control)]
            references += [("teachers", teacher) for phase in spec.phases for teacher in phase.teachers]
            for section, reference in references:
                if reference is not None and reference not in (known := getattr(self, section)):
                    raise ValueError(f"`{name}`: `{section}` has no `{reference}`; it has: {', '.join(known)}")
        return self


def read_settings(path: Path) -> StudySettings:
    """The settings in the file `path`. Raises UserError with one line that names the file, the key and what fits."""
    return validate_section(StudySettings, read_yaml(path), path.name)
