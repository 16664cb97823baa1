"""Sections under `students`: the model, its adapter, and the phases of its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import (
    DIVERGENCES,
    HIDDEN_STATE_TERMS,
    LAYERS,
    LOSS_TERMS,
    Count,
    Fraction,
    Name,
    Positive,
    Section,
)
from distillery.config.schema.training import AdapterSettings, TrainingConfig


class StudentInit(Section):
    """Which of the model's layers the student keeps: a list of indices, `all`, `first-N`, `last-N` or `every-N`.

    freeze: `embeddings` leaves the token vectors as they are, most of a small encoder's parameters.
    """

    layers: Annotated[list[Count], Field(min_length=1)] | Annotated[str, Field(pattern=LAYERS)] = "all"
    freeze: Literal["nothing", "embeddings"] = "nothing"


class EarlyStoppingConfig(Section):
    metric: Literal["accuracy", "macro_f1", "loss"] = "macro_f1"
    patience: Annotated[int, Field(gt=0)] = 3
    every: Annotated[int, Field(gt=0)]  # optimizer steps between two looks at the validation split


class PseudoLabelFilter(Section):
    """Which pseudo-labels to learn from: of at least this confidence (of the teachers' mean), that all of them give."""

    min_confidence: Fraction = 0.0
    agreement: bool = False


class PhaseConfig(TrainingConfig):
    """One leg of a student's training.

    space: what the divergences compare. `labels`: the distribution over the task's labels, exact at any temperature.
    `vocabulary`: the next token's, at every token of the answer; the teachers must be language models.
    """

    data: Annotated[list[str], Field(min_length=1)]  # `source/split`
    teachers: list[Name] = []
    mix: Literal["uniform", "validation", "confidence"] = "uniform"
    pseudo_labels: PseudoLabelFilter = PseudoLabelFilter()  # of the rows without a gold label
    loss: Annotated[dict[Literal[LOSS_TERMS], Positive], Field(min_length=1)]
    space: Literal["labels", "vocabulary"] = "labels"
    temperature: Positive = 1.0
    scale_by_t2: bool = True  # Hinton et al. 2015: keeps the gradient's size independent of the temperature
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of `jsd`; its ends are `kl` and `reverse_kl`
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1  # of `skew_*`
    # teacher layer of the student's layers: a rule of PKD, or a list of layers or of [student, teacher] pairs
    layers: Literal["skip", "last"] | list[Count | Annotated[list[Count], Field(min_length=2, max_length=2)]] = "skip"
    rationales: bool = False  # the divergences cover the tokens of the rationales, too
    top_k: Annotated[int, Field(gt=0)] | None = None  # keep so many outcomes of a vocabulary, not all
    on_policy: Fraction = 0.0  # share of batches whose answers the student writes itself
    max_new_tokens: Annotated[int, Field(gt=0)] = 16  # of these answers
    sampling_temperature: Positive = 1.0  # at which these answers are drawn
    order: Literal["random", "confidence", "length"] = "random"
    early_stopping: EarlyStoppingConfig | None = None

    @property
    def needs_token_logprobs(self) -> bool:
        """Whether the teachers are asked about tokens, not only about labels."""
        return "uld" in self.loss or (self.space == "vocabulary" and any(term in DIVERGENCES for term in self.loss))

    @property
    def needs_hidden_states(self) -> bool:
        return any(term in HIDDEN_STATE_TERMS for term in self.loss)

    @property
    def trains_on_rationales(self) -> bool:
        return self.rationales or "rationale" in self.loss

    @model_validator(mode="after")
    def _terms_fit(self):
        signals = [term for term in self.loss if term not in ("ce", "rationale", "label_prior")]
        if signals and not self.teachers:
            raise ValueError(f"loss term `{signals[0]}` needs `teachers`")
        if self.order == "confidence" and not self.teachers:
            raise ValueError("`order: confidence` needs `teachers`")
        if self.on_policy and not (self.space == "vocabulary" and self.needs_token_logprobs and "uld" not in self.loss):
            raise ValueError("`on_policy` needs `space: vocabulary` and a divergence in `loss`")
        if self.top_k:
            other = [term for term in self.loss if term in (*DIVERGENCES, "uld") and term != "kl"]
            if self.space != "vocabulary" or "kl" not in self.loss or other or len(self.teachers) != 1:
                raise ValueError("`top_k` needs `space: vocabulary`, one teacher, and `kl` as the only divergence")
            if self.temperature != 1:
                raise ValueError("`top_k` needs `temperature: 1`: at another, the mass of the rest is not known")
            if self.on_policy:
                raise ValueError("`top_k` is for signals that are kept; with `on_policy` the teacher is asked anew")
        return self


class StudentConfig(Section):
    """A model and a list of phases. `control` names the student that differs from this one in one thing only."""

    model: Name
    arch: Literal["causal", "classifier", "seq2seq"]
    init: StudentInit = StudentInit()
    adapter: AdapterSettings = AdapterSettings()
    phases: list[PhaseConfig]
    control: Name | None = None
    prompt: Literal["chat", "plain"] = "chat"
    few_shot: Count = 0
    max_length: Annotated[int, Field(gt=8)] = 256
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False  # less memory: activations are computed again during backward
    checkpoint_every: Annotated[int, Field(gt=0)] = 50  # optimizer steps between two checkpoints
