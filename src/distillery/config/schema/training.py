"""Settings of gradient descent, shared by phases of students and fine-tuning of teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import LAYERS, Count, Fraction, Positive, Section

if TYPE_CHECKING:
    from distillery.config.schema.students import PhaseConfig


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2022, LoRA)."""

    r: Annotated[int, Field(gt=0)] = 16
    """Rank of the adapters."""
    alpha: Positive | None = None
    """Scale of the adapters; 2 r when not given."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the adapters."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers that get an adapter."""
    layers: Annotated[list[Count], Field(min_length=1)] | Annotated[str, Field(pattern=LAYERS)] = "all"
    """Layers that get adapters: a list of indices from 0, `all`, `first-N`, `last-N` or `every-N`. `last-N` trains
    faster: the layers below are frozen, and their outputs are computed once a row."""


class AdapterSettings(LoraSettings):
    """Adapters of a student, or none: then all its weights are trained."""

    kind: Literal["none", "lora", "qlora"] = "none"
    """`lora`: adapters alone are trained. `qlora`: as well, on weights of 4 bits (Dettmers et al. 2023)."""


class TrainingConfig(Section):
    """Settings of gradient descent (AdamW). Exactly one of `epochs` and `steps` gives its length."""

    epochs: Positive | None = None
    """Passes over the rows."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps."""
    learning_rate: Positive
    """Highest learning rate of the schedule."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Rows in one batch."""
    accumulate: Annotated[int, Field(gt=0)] = 1
    """Batches in one optimizer step."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    warmup: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay."""
    max_grad_norm: Positive = 1.0
    """Norm to which longer gradients are clipped."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` or `steps`")
        return self


class FinetuneConfig(TrainingConfig):
    """Fine-tuning of a teacher on gold rows."""

    on: str
    """The rows, `source/train`."""
    lora: LoraSettings | None = None
    """Adapters to train instead of all weights."""
    folds: Literal[0] | Annotated[int, Field(ge=2)] = 2
    """Copies of the teacher that are each tuned without one part of the rows, for signals on these rows. 0: none; the
    teacher then gives no signals for the rows it was tuned on."""

    def as_phase(self) -> PhaseConfig:
        """The same gradient descent as a phase: the cross-entropy of the gold labels of `on`."""
        from distillery.config.schema.students import PhaseConfig  # which imports this module

        settings = {key: getattr(self, key) for key in TrainingConfig.model_fields}
        return PhaseConfig(data=[self.on], loss={"ce": 1.0}, **settings)
