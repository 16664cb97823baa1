"""Trainers of transformers and TRL with the phase's rows and loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from distillery.config.schema import PhaseConfig
from distillery.models.fast_cpu import train_used_embeddings, use_bit_dropout
from distillery.models.label_model import Completion, LabelModel
from distillery.models.memory import release_free_memory
from distillery.models.packed.frozen_layers import SharedStates, compute_frozen_states
from distillery.models.packed.recorded_passes import recorded_passes
from distillery.models.scoring import scored_completions
from distillery.training.checkpoints import CheckpointsMixin
from distillery.training.completions import PhaseCompletions, StepCounts
from distillery.training.on_policy import EarlierAnswersMixin, on_policy_share
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.phase_loss import PhaseLoss
from distillery.training.processes import process_count, process_rank, sum_values
from distillery.training.progress import LOG_EVERY, ProgressPrinter, example_line
from distillery.training.rows import TrainingRows
from distillery.training.sampler import BalancedSampler, LengthGroupedSampler
from distillery.training.served_teacher import ServedTeacher
from distillery.training.sharding import compute_together, predict_in_step, whole_weights
from distillery.training.shared_predictions import predict_alike
from distillery.training.shared_steps import PlainStep, SharedStepsMixin
from distillery.training.stopping import (
    PatienceCallback,
    count_optimizer_steps,
    evaluation_interval,
    schedule_arguments,
)
from distillery.training.teacher_signals import TeacherSignals
from distillery.training.validation import validation_scores

RELEASE_EVERY = 20  # optimizer steps: rare enough to take no time


class PhaseTrainerMixin(CheckpointsMixin, SharedStepsMixin):
    """What this repository changes in a trainer: which rows make a batch, the loss, and the scores on validation rows.

    A batch of the data loader holds the indices of its rows; :meth:`get_batch_samples` turns it into a `MicroBatch`.
    """

    # Trainer would divide by the micro-batches once more; the denominators here span the whole optimizer step
    loss_is_scaled_for_ga = True

    def prepare(
        self,
        student: LabelModel,
        rows: TrainingRows,
        phase: PhaseConfig,
        seed: int,
        validation: TrainingRows | None,
        teachers: dict[str, OpenableTeacher | ServedTeacher],
        shared: SharedStates | None = None,
    ) -> None:
        """Encode the rows, and compute once everything that the phase's terms need of the teachers."""
        self.student, self.rows, self.phase, self.seed, self.validation = student, rows, phase, seed, validation
        self.token_ids = student.encode(rows.texts)
        # since the last logged step; numbers only then: a GPU goes on while the next step is prepared
        self.term_values: dict[str, list[torch.Tensor]] = {}
        self.logged_step: int | None = None
        if rows.answers is not None:
            student.set_answers(rows.answers)  # before teachers compare their tokens with the student's
        self.signals = TeacherSignals(phase, rows, teachers, student, seed)
        self.completions = PhaseCompletions(student, rows, phase, self.signals.generated)
        self.phase_loss = PhaseLoss(phase, rows, self.completions, self.signals)
        if self.signals.projections:
            # so that the optimizer trains them; in a list, since names of teachers may hold dots
            self.model.projections = torch.nn.ModuleList(self.signals.projections.values())
        use_bit_dropout(self.model)
        if student.arch == "classifier":  # other models' embeddings are also their output head
            used = {student.tokenizer.pad_token_id, *(token for ids in self.token_ids for token in ids)}
            train_used_embeddings(self.model, used)
        self.share_model()
        repeats = count_optimizer_steps(len(rows), phase) * phase.accumulate * phase.batch_size > len(rows)
        if student.arch == "causal" and repeats and not phase.on_policy and not self.signals.student_layers:
            predict_in_step(student, lambda: self._compute_frozen_states(shared))
        if student.arch == "causal" and student.sharded is None and process_count() == 1:
            student.recorded = recorded_passes(self.model, student.frozen_states)

    def _compute_frozen_states(self, shared: SharedStates | None) -> None:
        """Compute once what the student's frozen lower layers, if it has any, give for all rows of the phase."""
        student, label_space = self.student, self.phase_loss.requested_outputs["label_space"]
        labels = student.label_token_ids if label_space else []
        end_token = student.tokenizer.eos_token_id
        scored = scored_completions(len(self.rows), labels, self.completions.off_policy, end_token)
        longest = max(len(tokens) for row in scored for tokens, _ in row)
        if student.forward_methods(self.token_ids, longest).scoring == "packed":
            with student.autocast():
                student.frozen_states = compute_frozen_states(self.model, self.token_ids, scored, shared)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths, entropy = [len(ids) for ids in self.token_ids], None
        if self.phase.balance == "batches":
            return BalancedSampler(lengths, self.phase.batch_size, self.seed, self.rows.targets)
        if self.rows.logprobs is not None:
            # of label sets, the sum over labels
            logprobs = self.rows.logprobs.flatten(1)
            entropy = (-(logprobs.exp() * logprobs.clamp_min(-100)).sum(-1)).tolist()
        return LengthGroupedSampler(lengths, self.phase.batch_size, self.seed, self.phase.order, entropy)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, and what the whole step will be divided by."""
        if self.logged_step is None:
            self.logged_step = self.state.global_step  # not 0 in a run that continues from a checkpoint
        if self.state.global_step % RELEASE_EVERY == 0:
            release_free_memory()
        batches, _ = super().get_batch_samples(*args, **kwargs)
        rows = [batch.pop("index").tolist() for batch in batches]
        kinds = [self.is_sampled(k) for k in range(len(batches))]
        shares = self.share_step(rows, kinds)
        with whole_weights(self.student) if any(kinds) else nullcontext():
            answers = [self.sample_answers(own, k) if sampled else None for k, (own, sampled) in enumerate(shares)]
        for batch, (own, _), sampled in zip(batches, shares, answers, strict=True):
            batch["micro_batch"] = self.completions.micro_batch(own, sampled)
        self.counts = self.count_step(StepCounts.of([batch["micro_batch"] for batch in batches]))
        self.fill_empty(batches)
        return batches, None

    def is_sampled(self, micro_batch: int) -> bool:
        """Whether the student answers the rows of this micro-batch of the step itself, learning on-policy."""
        return False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The phase's loss on `inputs["micro_batch"]`, divided by the counts of the whole optimizer step."""
        batch = inputs["micro_batch"]
        ids = [self.token_ids[i] for i in batch.rows]

        def compute() -> Any:
            outputs = self.student.forward(ids, batch.completions, **self.phase_loss.requested_outputs)
            loss, values = self.phase_loss(outputs, batch, self.counts)
            if batch.counted:
                for term, value in values.items():
                    self.term_values.setdefault(term, []).append(value.detach())
            loss = loss if batch.counted else 0 * loss
            return (loss, outputs) if return_outputs else loss

        return compute_together(self.student, compute)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log `logs`, and with a training loss the mean of each term since the last logged step."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - (self.logged_step or 0))
            sums = sum_values({term: sum(x.item() for x in values) for term, values in self.term_values.items()})
            logs |= {f"term_{term}": value / steps for term, value in sums.items()}
            self.logged_step, self.term_values = self.state.global_step, {}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores on the validation rows, for early stopping and curves."""
        scores = validation_scores(self.student, self.validation)
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        step = self.state.global_step
        print(predict_alike(self.student, lambda: example_line(self.student, self.rows, step)), flush=True)
        return scores


class EncoderTrainer(PhaseTrainerMixin, Trainer):
    """Distillation of an encoder, or of an encoder and decoder (TRL has no trainer for those)."""


class CausalTrainer(PhaseTrainerMixin, SFTTrainer):
    """Supervised and distilled fine-tuning of a causal model on stored teacher outputs.

    `compute_loss` replaces TRL's, which knows no teacher and runs the output head over every position.
    """


class OnPolicyTrainer(EarlierAnswersMixin, PhaseTrainerMixin, PlainStep, GKDTrainer):
    """Distillation on answers that the student generates itself (Agarwal et al. 2024, GKD), scored by the teachers.

    What is overridden, and the fault of TRL 1.16.0 that it mends:
    `__init__`: knows one teacher and refuses vocabularies that are padded differently; here teachers are opened when
    they are needed, one model for each fold, and the ids that both vocabularies hold are compared.
    `get_batch_samples` (in the mixin): divides by the data set's labels, not by the tokens that were generated; here
    all answers of an optimizer step are generated before its first backward pass, and counted.
    `training_step` (in `PlainStep`): draws from Python's global random state and generates for one micro-batch at a
    time.
    `compute_loss` (in the mixin): drops the temperature, has no cross-entropy, jumps at the ends of beta, and runs
    both models over every position with full-vocabulary logits for the prompt.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # the student stands in for the teachers, which TeacherSignals opens
        super().__init__(*args, teacher_model=kwargs["model"], **kwargs)

    def _draws(self, *micro_batch: int) -> tuple[float, int]:
        """A share of 1, and a seed: functions of the step alone, so that a resumed run generates what it would have."""
        rng = np.random.default_rng([self.seed, self.state.global_step, *micro_batch])
        return rng.random(), int(rng.integers(2**31))

    def is_sampled(self, micro_batch: int) -> bool:
        return self._draws(micro_batch)[0] < on_policy_share(self.phase, self.state.log_history)

    def sample_answers(self, rows: list[int], micro_batch: int) -> list[Completion]:
        """Answers to `rows` that the student generates itself, now or earlier."""
        if (answers := self.earlier_answers(rows, micro_batch)) is not None:
            return answers
        place = (micro_batch, process_rank()) if process_count() > 1 else (micro_batch,)
        generated = self.student.generate_tokens(
            [self.token_ids[i] for i in rows],
            max_new_tokens=self.phase.max_new_tokens,
            temperature=self.phase.sampling_temperature,
            seed=self._draws(*place)[1],
            batch_size=len(rows),
        )
        self.keep_answers(rows, generated)
        return [(tokens, 0) for tokens in generated]


def training_arguments(
    phase: PhaseConfig, rows: int, folder: Path, seed: int, checkpoint_every: int, float16: bool, on_cpu: bool
) -> dict[str, Any]:
    """Keyword arguments of `TrainingArguments` for `phase` on `rows` rows, with checkpoints in `folder`."""
    stopping, steps = phase.stopping, count_optimizer_steps(rows, phase)
    every = evaluation_interval(rows, phase) if stopping else checkpoint_every
    look = every if stopping else min(phase.validate_every or steps, steps)
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": phase.batch_size,
        "gradient_accumulation_steps": phase.accumulate,
        "learning_rate": phase.learning_rate,
        **schedule_arguments(rows, phase),
        "weight_decay": phase.weight_decay,
        **({} if phase.optimizer == "adamw" else {"optim": phase.optimizer}),
        "max_grad_norm": phase.max_grad_norm,
        "seed": seed,
        "data_seed": seed,
        # a checkpoint falls on a logged step, or a resumed run would average the loss over fewer steps
        "logging_steps": math.gcd(min(LOG_EVERY, steps), every, look if phase.validate_every else 0),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if stopping or phase.validate_every else "no",
        "eval_steps": look if stopping or phase.validate_every else None,
        "load_best_model_at_end": bool(stopping),
        "metric_for_best_model": stopping.metric if stopping else None,
        "greater_is_better": stopping.metric != "loss" if stopping else None,
        "report_to": "none",  # `callbacks` track a run of several phases
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # LabelModel.autocast decides; float16's small gradients also need to be scaled up, which CPUs cannot do
        "bf16": False,
        "fp16": float16,
        "gradient_checkpointing": False,
        "use_cpu": on_cpu,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }


def use_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """`arguments` for one GPU: `Trainer` would give each that is visible a whole batch, which is another experiment."""
    if arguments.n_gpu > 1:
        others = f"{arguments.n_gpu} GPUs are visible; training uses one, {arguments.device}"
        print(f"{others}; name another with CUDA_VISIBLE_DEVICES", flush=True)
        arguments._n_gpu = 1
    return arguments


def _create_trainer(
    student: LabelModel, phase: PhaseConfig, arguments: dict[str, Any], inputs: dict[str, Any]
) -> PhaseTrainerMixin:
    """The trainer for the student's architecture. inputs: its model, data and callbacks."""
    if student.arch != "causal":
        return EncoderTrainer(args=use_one_gpu(TrainingArguments(**arguments)), **inputs)
    arguments |= {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    inputs |= {"processing_class": student.tokenizer}
    if phase.on_policy:
        trainer = OnPolicyTrainer(args=use_one_gpu(GKDConfig(**arguments, disable_dropout=False)), **inputs)
    else:
        trainer = CausalTrainer(args=use_one_gpu(SFTConfig(**arguments)), **inputs)
    for weight in trainer.model.parameters():
        if weight.requires_grad and student.sharded is None:
            # TRL narrows the adapters of a 4-bit model to bfloat16, where a small update rounds to none
            weight.data = weight.data.float()
    return trainer


def build_trainer(
    student: LabelModel,
    rows: TrainingRows,
    phase: PhaseConfig,
    *,
    folder: Path,
    seed: int,
    title: str,
    checkpoint_every: int,
    validation: TrainingRows | None = None,
    teachers: dict[str, OpenableTeacher | ServedTeacher] | None = None,
    shared: SharedStates | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> PhaseTrainerMixin:
    """The trainer of a phase, with everything that it needs of the teachers; see :func:`train_phase`."""
    stopping = phase.stopping
    on_cpu = student.device.type == "cpu"
    float16 = student.dtype == torch.float16 and student.device.type == "cuda"
    arguments = training_arguments(phase, len(rows), folder, seed, checkpoint_every, float16, on_cpu)
    data = Dataset.from_dict({"index": list(range(len(rows)))})
    inputs: dict[str, Any] = {
        "model": student.model,
        "train_dataset": data,
        "eval_dataset": data if stopping or phase.validate_every else None,
        "data_collator": lambda batch: {"index": torch.tensor([row["index"] for row in batch])},
        "callbacks": [
            ProgressPrinter(title),
            *([PatienceCallback(stopping)] if stopping else []),
            *callbacks,
        ],
    }
    trainer = _create_trainer(student, phase, arguments, inputs)
    trainer.remove_callback(PrinterCallback)
    trainer.prepare(student, rows, phase, seed, validation, teachers or {}, shared)
    return trainer
