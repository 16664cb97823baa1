"""Sections under `students`: the model, its adapter, and the phases of its training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import (
    DIVERGENCES,
    FROZEN,
    HIDDEN_STATE_TERMS,
    LAYERS,
    LOSS_TERMS,
    Count,
    Fraction,
    Name,
    Positive,
    Section,
)
from distillery.config.schema.texts import LongTextsConfig
from distillery.config.schema.training import AdapterSettings, TrainingConfig


class StudentInit(Section):
    """Which weights of the model the student starts from, and which of them it trains."""

    layers: Annotated[list[Count], Field(min_length=1)] | Annotated[str, Field(pattern=LAYERS)] = "all"
    """Layers of the model that the student has: a list of indices from 0, `all`, `first-N`, `last-N` or `every-N`."""
    freeze: Annotated[str, Field(pattern=FROZEN)] = "nothing"
    """`embeddings`: token vectors are not trained; they are most of a small encoder's parameters. `first-N`: nor are
    the lowest N layers, of encoder and decoder where it has both. A causal model trains faster then: the outputs of
    these layers are computed once a row."""


class PseudoLabelFilter(Section):
    """Which rows without a gold label to train on, by the teachers' predictions."""

    min_confidence: Fraction = 0.0
    """Smallest probability of the label, in the mean of the teachers."""
    agreement: bool = False
    """All teachers must predict the same label."""


class ActiveSelection(Section):
    """Which rows of a phase the student learns from, by what it predicts at the start of the phase."""

    by: Literal["doubt", "disagreement"] = "doubt"
    """`doubt`: the rows whose prediction has the highest entropy. `disagreement`: those whose prediction diverges most
    from the teachers' distribution (Kullback-Leibler)."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the rows that is kept, rounded up."""


class PhaseConfig(TrainingConfig):
    """One phase of a student's training: its rows, its teachers, its loss, its length."""

    data: Annotated[list[str], Field(min_length=1)]
    """The rows, each `source/train`, `source/pool` or `source/augmented`."""
    teachers: list[Name] = []
    """The teachers to learn from; none for gold labels alone."""
    mix: Literal["uniform", "validation", "confidence"] = "uniform"
    """Weights of several teachers: equal, by their accuracy on validation rows, or by their confidence in each row."""
    pseudo_labels: PseudoLabelFilter = PseudoLabelFilter()
    """Which rows without a gold label to train on; all when not given."""
    select: ActiveSelection | None = None
    """Learn only from the rows that tell this student most. Each phase with it chooses anew, so that several of them
    follow the student; all rows when not given. `pseudo_labels` filters before."""
    loss: Annotated[dict[Literal[LOSS_TERMS], Positive], Field(min_length=1)]
    """Loss terms and their weights. `ce`: cross-entropy with the label. `kl`, `reverse_kl`, `jsd`, `skew_kl`,
    `skew_reverse_kl`, `tvd`: divergence from the teachers' distribution. `uld`: distance of sorted probabilities, for a
    teacher with another tokenizer. `hidden`, `pkd`, `attention`, `cosine`: distance of hidden states. `rationale`:
    cross-entropy with the rationales' tokens. `label_prior`: divergence of the mean prediction from the shares of the
    gold labels."""
    space: Literal["labels", "vocabulary"] = "labels"
    """The distributions that divergences compare. `labels`: over the task's labels, exact at any temperature.
    `vocabulary`: over the next token, at every token of the answer; the teachers must be language models."""
    temperature: Positive = 1.0
    """Temperature of student and teachers in the divergences."""
    scale_by_t2: bool = True
    """Multiply divergences by the squared temperature, so that gradients stay as large (Hinton et al. 2015)."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the teacher in the mixture of `jsd`; its limits are `kl` and `reverse_kl`."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of a distribution that `skew_kl` and `skew_reverse_kl` mix into the other one; at 0 they are `kl` and
    `reverse_kl`."""
    layers: Literal["skip", "last"] | list[Count | Annotated[list[Count], Field(min_length=2, max_length=2)]] = "skip"
    """Layers whose hidden states are compared: a rule of PKD (Sun et al. 2019), a list of the teacher's layers for the
    student's layers 1, 2, …, or a list of [student, teacher] pairs."""
    rationales: bool = False
    """Divergences in `space: vocabulary` cover the tokens of rationales, too."""
    top_k: Annotated[int, Field(gt=0)] | None = None
    """Number of most likely tokens whose probabilities are kept, with the rest as one more outcome; all when not given.
    The divergences are then never above those of the whole vocabulary. A teacher of `kind: api` needs it."""
    tail_samples: Count = 0
    """Tokens drawn from the rest beside `top_k`: `kl` is then an estimate of its whole value without bias, not a lower
    bound. At 0 the rest is one outcome."""
    on_policy: Fraction | Literal["adaptive"] = 0.0
    """Share of the batches whose answers the student generates itself (Agarwal et al. 2024, GKD). `adaptive`: 0 at the
    start, and a tenth more whenever the loss on validation rows has risen by 0.1; the later the step, the more of
    these batches use its earlier answers (Ko et al. 2024, DistiLLM)."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 16
    """Largest length of a generated answer, in tokens."""
    sampling_temperature: Positive = 1.0
    """Temperature at which the student generates its answers."""
    validate_every: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps between two looks at the validation rows, for curves of their loss and accuracy, each with a
    printed training row. None when not given; with early stopping its `every` counts."""
    order: Literal["random", "confidence", "length"] = "random"
    """Order of the rows: random, from those the teachers are most confident in, or from the shortest."""

    @property
    def rows_text(self) -> str:
        """The rows for readers: `a/train, a/pool`, or `a/pool (50 % of the rows, by doubt)`."""
        text = ", ".join(self.data)
        return f"{text} ({100 * self.select.share:g} % of the rows, by {self.select.by})" if self.select else text

    @property
    def needs_token_logprobs(self) -> bool:
        """Whether the loss compares the teachers' distributions over tokens, not only over labels."""
        return "uld" in self.loss or (self.space == "vocabulary" and any(term in DIVERGENCES for term in self.loss))

    @property
    def compares_given_answers(self) -> bool:
        """Whether the teachers' distributions are compared at answers of the data, in some batches at least."""
        return self.needs_token_logprobs and self.on_policy != 1

    @property
    def needs_hidden_states(self) -> bool:
        return any(term in HIDDEN_STATE_TERMS for term in self.loss)

    @property
    def stops_by_agreement(self) -> bool:
        """Whether the agreement with the teachers on validation rows ends the training."""
        return self.stopping is not None and self.stopping.metric == "agreement"

    @property
    def trains_on_rationales(self) -> bool:
        return self.rationales or "rationale" in self.loss

    @model_validator(mode="after")
    def _terms_fit(self):
        signals = [term for term in self.loss if term not in ("ce", "rationale", "label_prior")]
        if signals and not self.teachers:
            raise ValueError(f"loss term `{signals[0]}` needs `teachers`")
        if self.select and self.select.by == "disagreement" and not self.teachers:
            raise ValueError("`select: {by: disagreement}` needs `teachers`")
        if self.stops_by_agreement and not self.teachers:
            raise ValueError("`early_stopping: {metric: agreement}` needs `teachers`")
        if self.order == "confidence" and not self.teachers:
            raise ValueError("`order: confidence` needs `teachers`")
        if self.balance == "batches" and self.order != "random":
            raise ValueError(f"`balance: batches` draws rows at random: leave out `order: {self.order}`")
        if self.balance == "class_weights" and not {"ce", "uld", *DIVERGENCES} & set(self.loss):
            raise ValueError("`balance: class_weights` weighs `ce`, the divergences and `uld`, and `loss` has none")
        if self.top_k:
            divergences = [term for term in self.loss if term in DIVERGENCES]
            if self.space != "vocabulary" or not divergences or "uld" in self.loss or len(self.teachers) != 1:
                raise ValueError("`top_k` needs `space: vocabulary`, one teacher, a divergence in `loss`, and no `uld`")
            if self.temperature != 1:
                raise ValueError("`top_k` needs `temperature: 1`: at another, the mass of the rest is not known")
            if self.on_policy:
                raise ValueError(
                    "`top_k` is for cached teacher outputs; with `on_policy` the teacher runs in every step"
                )
        if self.tail_samples and not (self.top_k and {"kl"} == set(self.loss) & set(DIVERGENCES)):
            raise ValueError("`tail_samples` needs `top_k`, and `kl` as the only divergence")
        return self

    @model_validator(mode="after")
    def _on_policy_fits(self):
        if self.on_policy and not (self.space == "vocabulary" and self.needs_token_logprobs and "uld" not in self.loss):
            raise ValueError("`on_policy` needs `space: vocabulary` and a divergence in `loss`")
        if self.on_policy == "adaptive" and not (self.validate_every or self.stopping):
            raise ValueError("`on_policy: adaptive` follows the loss on validation rows: add `validate_every`")
        return self


class StudentConfig(Section):
    """A student: a model and the phases of its training."""

    model: Name
    """The model in `models` that it starts from."""
    arch: Literal["causal", "classifier", "seq2seq"]
    """Architecture: causal language model, encoder with a classification head, or encoder and decoder."""
    init: StudentInit = StudentInit()
    """Which weights of the model it starts from."""
    adapter: AdapterSettings = AdapterSettings()
    """Adapters to train instead of all weights."""
    phases: list[PhaseConfig]
    """Phases of the training, one after the other; none leaves the model untrained."""
    control: Name | None = None
    """The student to compare with: trained alike, without teachers or with another loss."""
    test_source: Name | None = None
    """The source whose validation and test rows it is scored on; when not given, the last that it learns from."""
    prompt: Literal["chat", "plain"] = "chat"
    """Form of the prompt: the tokenizer's chat template, or the turns as plain text."""
    prompt_of: Name | None = None
    """The teacher whose choice among its `prompts` the student reads, too; when not given, the task's `prompt`."""
    few_shot: Count = 0
    """Solved examples of the task file in the prompt."""
    max_length: Annotated[int, Field(gt=8)] = 256
    """Largest length of text and prompt, in tokens; longer texts are cut."""
    long_texts: LongTextsConfig | None = None
    """Read texts longer than `max_length` in overlapping windows; for `arch: classifier`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Number format of the computation. `auto`: float32 or bfloat16, whichever is faster on this machine, for training
    and for prediction; timed once and kept in `.cache/dtype.json`."""
    gradient_checkpointing: bool = False
    """Compute activations again during the backward pass: less memory, more time."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 50
    """Optimizer steps between two checkpoints, from which an interrupted run resumes."""

    @model_validator(mode="after")
    def _frozen_layers_fit(self):
        if self.init.freeze.startswith("first-") and self.adapter.kind != "none":
            raise ValueError(f"`init.freeze: {self.init.freeze}` is without `adapter`, which has its own `layers`")
        return self

    @model_validator(mode="after")
    def _long_texts_fit(self):
        if self.long_texts and self.arch != "classifier":
            raise ValueError(f"`long_texts` is for `arch: classifier`, not {self.arch}")
        if self.long_texts and any(phase.needs_hidden_states for phase in self.phases):
            raise ValueError("`long_texts` is not for loss terms over hidden states: a text has no single one")
        return self
