"""The whole of `params.yaml` as one object."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from distillery.config.schema.augment import AugmentConfig
from distillery.config.schema.base import Name, Section, SourceName, SplitRef
from distillery.config.schema.data import SourceConfig
from distillery.config.schema.evaluate import EvaluateConfig, RecipeConfig, SearchConfig
from distillery.config.schema.models import ModelConfig
from distillery.config.schema.students import StudentConfig
from distillery.config.schema.teachers import TeacherConfig


class Params(Section):
    """The whole experiment."""

    seeds: Annotated[list[int], Field(min_length=1)]
    """Random seeds: each student is trained once with each of them."""
    data: Annotated[dict[SourceName, SourceConfig], Field(min_length=1)]
    """Data sets by name."""
    models: Annotated[dict[Name, ModelConfig], Field(min_length=1)]
    """Models by name, for teachers and students to start from."""
    teachers: dict[Name, TeacherConfig]
    """Teachers by name."""
    augment: AugmentConfig
    """Paraphrases of gold rows."""
    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]
    """Students by name."""
    evaluate: EvaluateConfig
    """How students and teachers are scored and compared."""
    search: SearchConfig | None = None
    """A search for settings of one phase, see `distillery search`."""
    recipe: RecipeConfig | None = None
    """The published system that this experiment reproduces."""
    scale: dict[Name, dict[str, Any]] = {}
    """Overlays by name that change this experiment, see `distillery recipe --scale`."""

    def test_source(self, student: str) -> str:
        """The source `student` is scored on: its own key's, or the last that it learns from (without phases: the
        headline's).
        """
        if own := self.students[student].test_source:
            return own
        phases = self.students[student].phases or self.students[self.evaluate.headline].phases
        return SplitRef.parse(phases[-1].data[-1]).source if phases else next(iter(self.data))

    def teacher_sources(self, teacher: str) -> list[str]:
        """The sources that `teacher` labels, in the order of `data`."""
        return self.teachers[teacher].data or list(self.data)
