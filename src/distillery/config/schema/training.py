"""Settings of gradient descent, shared by phases of students and fine-tuning of teachers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import LAYERS, Count, Fraction, Positive, Section

if TYPE_CHECKING:
    from distillery.config.schema.students import PhaseConfig


MAX_EPOCHS = 20  # of `epochs: auto`
MAX_STEPS = 2000  # of `steps: auto`


SERIES_ALONE, SERIES_FOREIGN = ("size", "activation"), ("r", "alpha", "dropout", "targets")  # keys of an adapter


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

    kind: Literal["none", "lora", "qlora", "series"] = "none"
    """`lora`: adapters alone are trained. `qlora`: as well, on weights of 4 bits (Dettmers et al. 2023). `series`:
    small layers that the outputs of attention and MLP pass through (Houlsby et al. 2019); they and a classifier's head
    are trained. They cannot be merged: only this project opens such a student, and it is not exported."""
    size: Annotated[int, Field(gt=0)] = 64
    """Of `series`: numbers a token between the two linear layers of an adapter. Of the other keys it has `layers`
    alone."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Of `series`: the function between the two linear layers of an adapter."""

    @model_validator(mode="after")
    def _keys_fit(self):
        for key in SERIES_FOREIGN if self.kind == "series" else SERIES_ALONE:
            if getattr(self, key) != type(self).model_fields[key].default:  # a stored section has all keys
                raise ValueError(f"`{key}` is no key of `kind: {self.kind}`")
        return self


class EarlyStoppingConfig(Section):
    """Stops a training that no longer improves, and returns to its best checkpoint."""

    metric: Literal["accuracy", "macro_f1", "loss", "agreement"] = "macro_f1"
    """Score on the validation rows to watch. `loss`: cross-entropy of their gold labels, or of the tokens of their
    first accepted answers. `agreement`: share of the rows for which the student predicts the label of its teachers,
    mixed as in the phase; no gold label counts, but in weights by `mix: validation`."""
    patience: Annotated[int, Field(gt=0)] = 3
    """Evaluations without an improvement after which the training stops."""
    every: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps between two evaluations; when not given, one epoch, but at least 20 and at most 500 steps."""


class TrainingConfig(Section):
    """Settings of gradient descent. Exactly one of `epochs` and `steps` gives its length."""

    epochs: Positive | Literal["auto"] | None = None
    """Passes over the rows. `auto`: until the score on the validation rows stops improving, see `early_stopping`."""
    steps: Annotated[int, Field(gt=0)] | Literal["auto"] | None = None
    """Optimizer steps; `auto` as for `epochs`."""
    max_epochs: Positive | None = None
    """Upper bound of `epochs: auto`; 20 when not given."""
    max_steps: Annotated[int, Field(gt=0)] | None = None
    """Upper bound of `steps: auto`; 2000 when not given."""
    learning_rate: Positive
    """Highest learning rate of the schedule."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Rows in one batch."""
    accumulate: Annotated[int, Field(gt=0)] = 1
    """Batches in one optimizer step."""
    schedule: Literal["linear", "cosine", "constant", "inverse_sqrt"] = "linear"
    """Course of the learning rate after the warm-up. `inverse_sqrt` needs no known end (Zhai et al. 2022, section 3.5):
    it is the default with `auto`."""
    warmup: Fraction = 0.1
    """Share of the steps in which the learning rate rises from 0; with `auto` it rises up to the first evaluation
    instead, unless this is 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"] = "adamw"
    """AdamW; `8bit`: with its two states in 8 bits (Dettmers et al. 2022); `paged`: with states that move to the CPU's
    memory while the GPU's is full (Dettmers et al. 2023). On a CPU a paged one is the same without pages."""
    max_grad_norm: Positive = 1.0
    """Norm to which longer gradients are clipped."""
    balance: Literal["none", "class_weights", "batches"] = "none"
    """Against rare labels. `class_weights`: rows weigh in the loss as n / (K n_k), so that all labels weigh alike (King
    and Zeng 2001). `batches`: each batch holds as many rows of each label, those of rare labels again and again."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop when the score on validation rows no longer improves; when not given, only with `auto`."""

    @property
    def is_auto(self) -> bool:
        """Whether validation rows decide the length."""
        return "auto" in (self.epochs, self.steps)

    @property
    def stopping(self) -> EarlyStoppingConfig | None:
        """The early stopping in force."""
        return self.early_stopping or (EarlyStoppingConfig() if self.is_auto else None)

    @property
    def most_epochs(self) -> float | None:
        """The epochs, or their upper bound; None where steps give the length."""
        return (self.max_epochs or MAX_EPOCHS) if self.epochs == "auto" else self.epochs

    @property
    def most_steps(self) -> int | None:
        """The steps, or their upper bound; None where epochs give the length."""
        return (self.max_steps or MAX_STEPS) if self.steps == "auto" else self.steps

    @property
    def length(self) -> str:
        """The length for readers: `240 steps`, `1 epoch`, `at most 20 epochs (early stopping)`."""
        number, unit = (self.most_steps, "step") if self.steps else (self.most_epochs, "epoch")
        text = f"{number:g} {unit}" + ("" if number == 1 else "s")
        return f"at most {text} (early stopping)" if self.stopping else text

    @model_validator(mode="before")
    @classmethod
    def _schedule_without_end(cls, values: Any) -> Any:
        if isinstance(values, dict) and "auto" in (values.get("epochs"), values.get("steps")):
            return {"schedule": "inverse_sqrt"} | values
        return values

    @model_validator(mode="after")
    def _one_length(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("needs exactly one of `epochs` or `steps`")
        for length in ("epochs", "steps"):
            if getattr(self, f"max_{length}") is not None and getattr(self, length) != "auto":
                raise ValueError(f"`max_{length}` is the upper bound of `{length}: auto`")
        if self.is_auto and self.schedule in ("linear", "cosine"):
            raise ValueError(
                f"`schedule: {self.schedule}` needs a known end: use `inverse_sqrt` or `constant` with `auto`"
            )
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

    @model_validator(mode="after")
    def _watches_gold_labels(self):
        if self.stopping and self.stopping.metric == "agreement":
            raise ValueError(
                "`metric: agreement` is for students, which have teachers; allowed: accuracy, macro_f1, loss"
            )
        return self

    def as_phase(self) -> PhaseConfig:
        """The same gradient descent as a phase: the cross-entropy of the gold labels of `on`."""
        from distillery.config.schema.students import PhaseConfig  # which imports this module

        settings = {key: getattr(self, key) for key in TrainingConfig.model_fields}
        return PhaseConfig(data=[self.on], loss={"ce": 1.0}, **settings)
