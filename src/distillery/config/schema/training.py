"""Settings of gradient descent, shared by phases of students and fine-tuning of teachers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import Fraction, Positive, Section


class LoraSettings(Section):
    r: Annotated[int, Field(gt=0)] = 16
    alpha: Positive | None = None  # 2 r when not given
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class AdapterSettings(LoraSettings):
    kind: Literal["none", "lora", "qlora"] = "none"


class TrainingConfig(Section):
    """What every gradient descent here needs; phases and fine-tuning share it."""

    epochs: Positive | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    learning_rate: Positive
    batch_size: Annotated[int, Field(gt=0)] = 16
    accumulate: Annotated[int, Field(gt=0)] = 1
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Positive = 1.0

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` or `steps`")
        return self


class FinetuneConfig(TrainingConfig):
    """Fine-tuning of a teacher on gold rows, and `folds` more on parts of them for out-of-fold signals.

    folds: 0 where no student learns from this teacher about the rows it was tuned on; it then says nothing of them.
    """

    on: str
    lora: LoraSettings | None = None
    folds: Literal[0] | Annotated[int, Field(ge=2)] = 2
