"""The loss of a phase: from student outputs, targets and teacher outputs to weighted terms."""

from __future__ import annotations

import torch
from torch import Tensor

from distillery import losses
from distillery.config.schema import DIVERGENCES, HIDDEN_STATE_TERMS, PhaseConfig
from distillery.errors import UserError
from distillery.models.devices import move_tensor
from distillery.models.label_model import ModelOutput
from distillery.training.completions import (
    ANSWER,
    RATIONALE,
    SAMPLED,
    MicroBatch,
    PhaseCompletions,
    StepCounts,
    count_supervised,
)
from distillery.training.rows import TrainingRows
from distillery.training.teacher_signals import TeacherSignals


class PhaseLoss:
    """The weighted sum of a phase's loss terms, for the outputs of a student on one micro-batch.

    Each term is divided by what the whole optimizer step holds of its kind, so that micro-batches of any size add up
    to one big batch: terms over labels and hidden states by rows, the others by the tokens that they supervise.
    """

    def __init__(self, phase: PhaseConfig, rows: TrainingRows, completions: PhaseCompletions, signals: TeacherSignals):
        self.phase, self.rows, self.completions, self.signals = phase, rows, completions, signals
        self.weights = phase.loss
        self.divergences = {term: weight for term, weight in phase.loss.items() if term in DIVERGENCES}
        self.hidden_state_terms = [term for term in phase.loss if term in HIDDEN_STATE_TERMS]
        if phase.balance != "none" and rows.answers is not None:
            raise UserError("balance: answers are free text, not labels; leave it out")
        # of `ce`, the divergences and `uld`; None for ones
        weighted = phase.balance == "class_weights"
        self.row_weights = losses.balanced_weights(rows.label_distributions()) if weighted else None

    def _weights(self, batch: MicroBatch, device: torch.device, tokens: list[int] | None = None) -> Tensor | None:
        """The weight of each row of `batch`, or of each token where rows have so many `tokens`; None for ones."""
        if self.row_weights is None:
            return None
        weights = self.row_weights[batch.rows]
        return (weights if tokens is None else weights.repeat_interleave(torch.tensor(tokens))).to(device)

    @property
    def requested_outputs(self) -> dict[str, object]:
        """The keyword arguments of :meth:`LabelModel.forward` that return what the terms need; no prompt's logits."""
        return {
            "label_space": bool(self.divergences and self.phase.space == "labels") or "label_prior" in self.weights,
            "layers": self.signals.student_layers,
            "activation_maps": "attention" in self.weights,
        }

    def __call__(self, outputs: ModelOutput, batch: MicroBatch, counts: StepCounts) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar, and the value of each term without its weight.

        outputs: of the student, for the rows and completions of `batch`. counts: of the optimizer step.
        Raises UserError when a teacher's outputs and the student's cannot be compared.
        """
        values = self._gold_terms(outputs, batch, counts)
        total = sum(self.weights[term] * value for term, value in values.items())
        if self.divergences:
            loss, terms = self._divergence_terms(outputs, batch, counts)
            total, values = total + loss, values | terms
        others: dict[str, Tensor] = {}
        if "uld" in self.weights:
            others["uld"] = self._logit_distance(outputs.completion_logits, batch, counts)
        if self.hidden_state_terms:
            others |= self._hidden_state_terms(outputs, batch, counts)
        if "label_prior" in self.weights:
            penalty = losses.shortcut_penalty(
                outputs.label_logits, move_tensor(self.rows.label_prior, outputs.label_logits.device)
            )
            others["label_prior"] = penalty * len(batch.rows) / counts.rows
        for term, value in others.items():
            total = total + self.weights[term] * value
        return total, values | others

    def _gold_terms(self, outputs: ModelOutput, batch: MicroBatch, counts: StepCounts) -> dict[str, Tensor]:
        """`ce` and `rationale`: negative log-likelihoods of the targets and of the rationales."""
        values = {}
        if "ce" in self.weights:
            if batch.completions is None:  # a classifier has classes, not tokens
                targets = torch.as_tensor(self.rows.targets[batch.rows], device=outputs.label_logits.device)
                weights = self._weights(batch, targets.device)
                logits, decisions = self._label_decisions(outputs.label_logits, counts)
                if self.rows.are_sets:
                    targets = losses.two_outcome_probabilities(targets).flatten(0, 1)
                values["ce"] = losses.reduce(losses.cross_entropy(logits, targets), weights, decisions)
            else:
                mask = self._token_mask(batch, ANSWER, outputs.completion_nll)
                weights = self._weights(batch, mask.device, batch.supervised_tokens)
                mask = mask if weights is None else mask * weights
                values["ce"] = losses.reduce(outputs.completion_nll, mask, counts.answer_tokens)
        if "rationale" in self.weights:
            mask = self._token_mask(batch, RATIONALE, outputs.completion_nll)
            values["rationale"] = losses.reduce(outputs.completion_nll, mask, max(1, counts.rationale_tokens))
        return values

    def _label_decisions(self, label_logits: Tensor, counts: StepCounts) -> tuple[Tensor, int]:
        """Logits of every decision on labels, and their number in the optimizer step.

        One a row between all labels; of label sets one for each label, between `no` and `yes`.
        """
        if not self.rows.are_sets:
            return label_logits, counts.rows
        return losses.two_outcome_logits(label_logits), counts.rows * label_logits.shape[1]

    @staticmethod
    def _token_mask(batch: MicroBatch, kind: int, like: Tensor) -> Tensor:
        """Which supervised tokens are of `kind` [m], on the device of `like`."""
        return torch.tensor(batch.token_kinds, device=like.device) == kind

    def _divergence_terms(
        self, outputs: ModelOutput, batch: MicroBatch, counts: StepCounts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the divergences in the phase's space, and their values."""
        if self.phase.space == "labels":
            teacher = self.rows.logprobs[batch.rows].to(outputs.label_logits.device)
            weights = self._weights(batch, teacher.device)
            logits, decisions = self._label_decisions(outputs.label_logits, counts)
            return self._combine(logits, teacher.reshape(logits.shape), decisions, weights)
        logits, tokens = outputs.completion_logits, counts.compared_tokens
        weights = self._weights(batch, logits.device, batch.compared_tokens)
        if batch.sampled is not None:
            sampled = [k for k, kind in enumerate(batch.token_kinds) if kind == SAMPLED]
            logits = logits[torch.tensor(sampled, device=logits.device)]
        if self.phase.top_k:
            return self._top_k_terms(logits, batch, tokens, weights)
        teachers = [logprobs.to(logits.device) for logprobs in self.signals.token_logprobs(batch)]
        try:
            shared = [losses.shared_vocabulary(logits, logprobs) for logprobs in teachers]
        except ValueError as error:
            raise UserError(f"phases: teachers: {error}") from None
        width = min(student.shape[1] for student, _ in shared)
        teachers = [teacher[:, :width] for _, teacher in shared]
        if len(teachers) == 1:
            return self._combine(logits[:, :width], teachers[0], tokens, weights)
        repeats = torch.tensor(batch.compared_tokens)
        teacher_weights = [
            self.rows.teacher_weights[name][batch.rows].repeat_interleave(repeats) for name in self.phase.teachers
        ]
        mixed = losses.mix_teachers(torch.stack(teachers), move_tensor(torch.stack(teacher_weights), logits.device))
        return self._combine(logits[:, :width], mixed, tokens, weights)

    def _top_k_terms(
        self, logits: Tensor, batch: MicroBatch, denominator: int, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As :meth:`_divergence_terms`, of a teacher whose likeliest tokens were kept."""
        outputs = self.signals.outputs[self.phase.teachers[0]]
        top_k = [part.to(logits.device) for part in outputs.top_k(batch.rows)]
        if not self.phase.tail_samples:
            return self._combine(*losses.merge_rest(logits, *top_k), denominator, weights)
        rest = [part.to(logits.device) for part in outputs.rest(batch.rows)]
        value = losses.reduce(losses.kl_sampled_rest(logits, *top_k, *rest), weights, denominator)
        return self.weights["kl"] * value, {"kl": value.detach()}

    def _combine(
        self, logits: Tensor, teacher: Tensor, denominator: int, weights: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        phase = self.phase
        return losses.combine_terms(
            self.divergences,
            logits,
            teacher_logprobs=teacher,
            temperature=phase.temperature,
            scale_by_t2=phase.scale_by_t2,
            beta=phase.beta,
            alpha=phase.alpha,
            denominator=denominator,
            mask=weights,
        )

    def _logit_distance(self, logits: Tensor, batch: MicroBatch, counts: StepCounts) -> Tensor:
        """The universal logit distance at the tokens that both tokenizations have, weighted over teachers."""
        total = torch.zeros((), device=logits.device)
        for name in self.phase.teachers:
            student_tokens, teacher_tokens, weights = self._shared_positions(name, batch)
            teacher = self.signals.outputs[name].logprobs(batch.rows)[teacher_tokens].to(logits.device)
            distances = losses.universal_logit_distance(logits[student_tokens], teacher)
            total = total + (distances * torch.tensor(weights, dtype=distances.dtype, device=distances.device)).sum()
        return total / counts.compared_tokens

    def _shared_positions(self, name: str, batch: MicroBatch) -> tuple[list[int], list[int], list[float]]:
        """The tokens that are compared with teacher `name`, whose tokenizer may be another one.

        Each completion is compared up to the end of its shorter tokenization. Returns the positions among the
        student's supervised tokens, those among the teacher's, and the weight of the distance at each.
        """
        teacher_lengths = self.signals.outputs[name].completion_lengths
        student_tokens: list[int] = []
        teacher_tokens: list[int] = []
        weights: list[float] = []
        student_start = teacher_start = 0
        shares = self.signals.teacher_shares(name, batch.rows)
        if self.row_weights is not None:
            shares = shares * self.row_weights[batch.rows]
        for i, share in zip(batch.rows, shares.tolist(), strict=True):
            for j, completion in enumerate(self.completions.by_row[i]):
                student_length = count_supervised([completion])
                teacher_length = int(teacher_lengths[self.completions.offsets[i] + j])
                shared = min(student_length, teacher_length)
                student_tokens += range(student_start, student_start + shared)
                teacher_tokens += range(teacher_start, teacher_start + shared)
                weights += [share] * shared
                student_start, teacher_start = student_start + student_length, teacher_start + teacher_length
        return student_tokens, teacher_tokens, weights

    def _hidden_state_terms(self, outputs: ModelOutput, batch: MicroBatch, counts: StepCounts) -> dict[str, Tensor]:
        """The terms that compare hidden states, weighted over teachers."""
        values: dict[str, Tensor] = {}
        for name in self.phase.teachers:
            teacher = self.signals.outputs[name].hidden_states(batch.rows).to(outputs.hidden_states.device)
            for term in self.hidden_state_terms:
                try:
                    distances = self._hidden_state_distances(term, name, outputs, teacher, batch)
                except ValueError as error:
                    raise UserError(f"phases: loss.{term}: teacher `{name}`: {error}") from None
                shares = self.signals.teacher_shares(name, batch.rows).to(distances)
                values[term] = values.get(term, 0) + (distances * shares).sum()
        return {term: value / counts.rows for term, value in values.items()}

    def _hidden_state_distances(
        self, term: str, name: str, outputs: ModelOutput, teacher: Tensor, batch: MicroBatch
    ) -> Tensor:
        """[rows]: the value of `term` between the student and teacher `name`, whose states are `teacher`."""
        student, n = outputs.hidden_states, len(self.signals.layer_pairs[name]) - 1  # the last pair is `cosine`'s
        if term == "cosine":
            return losses.cosine_embedding(student[:, n], teacher[:, n])
        if term == "pkd":
            return losses.pkd(student[:, :n], teacher[:, :n])
        if term == "attention":
            maps = self.signals.outputs[name].activation_maps(batch.rows, outputs.activation_maps.shape[-1])
            maps = maps.to(outputs.activation_maps.device)
            return losses.attention_transfer_maps(outputs.activation_maps[:, :n], maps[:, :n])
        projections = self.signals.projections[name] if name in self.signals.projections else [None] * n
        return sum(losses.hidden_mse(student[:, j], teacher[:, j], projections[j]) for j in range(n)) / n
