"""The whole of `params.yaml` as one object."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distillery.config.schema.augment import AugmentConfig
from distillery.config.schema.base import Name, Section, SourceName, SplitRef
from distillery.config.schema.compute import ComputeConfig
from distillery.config.schema.data import OwnSplits, SourceConfig
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
    compute: ComputeConfig = ComputeConfig()
    """On what students and teachers are trained."""
    search: SearchConfig | None = None
    """A search for settings of one phase, see `distillery search`."""
    recipe: RecipeConfig | None = None
    """The published system that this experiment reproduces."""
    tracking: list[Literal["tensorboard", "mlflow", "wandb", "dvclive"]] = []
    """Trackers to which the training of each student is logged, with its test scores; it changes no result, see
    docs/tracking.md."""
    scale: dict[Name, dict[str, Any]] = {}
    """Overlays by name that change this experiment, see `distillery recipe --scale`."""

    def test_source(self, student: str) -> str:
        """The source whose validation and test rows choose and score `student`: its own key's, or the last that it
        learns from.

        Where that has none, an earlier one, and then the first source of its task that has both. Without phases: the
        headline's.
        """
        if own := self.students[student].test_source:
            return own
        phases = self.students[student].phases or self.students[self.evaluate.headline].phases
        learned = [SplitRef.parse(text).source for phase in phases for text in phase.data] or [next(iter(self.data))]
        task = self.data[learned[-1]].task
        of_task = [name for name, source in self.data.items() if source.task == task]
        complete = [s for s in (*reversed(learned), *of_task) if all(map(self.data[s].holds, ("validation", "test")))]
        return complete[0] if complete else learned[-1]

    def other_test_sources(self, student: str) -> list[str]:
        """The further sources of the task of `student` that may hold test rows, in the order of `data`; none without
        `evaluate.further_sources`."""
        if not self.evaluate.further_sources:
            return []
        own = self.test_source(student)
        task = self.data[own].task
        return [s for s, source in self.data.items() if s != own and source.task == task and source.holds("test")]

    def sources_with_own_tests(self, source: str) -> dict[str, SourceConfig]:
        """The other sources of the task of `source` whose files name their test rows, with these files alone."""
        others = {}
        for name, spec in self.data.items():
            if name == source or spec.task != self.data[source].task or spec.is_on_hub:
                continue
            if spec.splits and spec.splits.test:
                others[name] = spec.model_copy(update={"splits": OwnSplits(test=spec.splits.test)})
            elif spec.split_column:
                others[name] = spec
        return others

    def sources_with_held_out_rows(self, source: str) -> dict[str, SourceConfig]:
        """The other sources of the task of `source` that hold validation or test rows."""
        task = self.data[source].task
        of_task = {name: spec for name, spec in self.data.items() if name != source and spec.task == task}
        return {name: spec for name, spec in of_task.items() if spec.holds("validation") or spec.holds("test")}

    def teacher_sources(self, teacher: str) -> list[str]:
        """The sources that `teacher` labels, in the order of `data`."""
        return self.teachers[teacher].data or list(self.data)
