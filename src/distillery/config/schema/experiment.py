"""The whole of `params.yaml` as one object."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from distillery.config.schema.augment import AugmentConfig
from distillery.config.schema.base import Name, Section, SplitRef
from distillery.config.schema.data import SourceConfig
from distillery.config.schema.evaluate import EvaluateConfig, RecipeConfig, SearchConfig
from distillery.config.schema.models import ModelConfig
from distillery.config.schema.students import StudentConfig
from distillery.config.schema.teachers import TeacherConfig


class Params(Section):
    seeds: Annotated[list[int], Field(min_length=1)]
    data: Annotated[dict[Name, SourceConfig], Field(min_length=1)]
    models: Annotated[dict[Name, ModelConfig], Field(min_length=1)]
    teachers: dict[Name, TeacherConfig]
    augment: AugmentConfig
    students: Annotated[dict[Name, StudentConfig], Field(min_length=1)]
    evaluate: EvaluateConfig
    search: SearchConfig | None = None
    recipe: RecipeConfig | None = None
    scale: dict[Name, dict[str, Any]] = {}  # overlays, see `distillery recipe`

    def test_source(self, student: str) -> str:
        """The source `student` is scored on: the last that it learns from (without phases: the headline's)."""
        phases = self.students[student].phases or self.students[self.evaluate.headline].phases
        return SplitRef.parse(phases[-1].data[-1]).source if phases else next(iter(self.data))

    def teacher_sources(self, teacher: str) -> list[str]:
        """The sources that `teacher` labels, in the order of `data`."""
        return self.teachers[teacher].data or list(self.data)
