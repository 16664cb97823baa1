"""Trainers of transformers and TRL with the phase's rows and loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from distillery.config.schema import TrainingConfig
from distillery.models.label_model import Completion, LabelModel
from distillery.training.phase_loss import PhaseTrainerMixin
from distillery.training.rows import TrainingRows
from distillery.training.teacher_models import OpenableTeacher

LOG_EVERY = 10  # optimizer steps


class EncoderTrainer(PhaseTrainerMixin, Trainer):
    """Distillation of an encoder, or of an encoder and decoder (TRL has no trainer for those)."""


class CausalTrainer(PhaseTrainerMixin, SFTTrainer):
    """Supervised and distilled fine-tuning of a causal model on kept signals.

    `compute_loss` replaces TRL's, which knows no teacher and runs the output head over every position.
    """


class OnPolicyTrainer(PhaseTrainerMixin, GKDTrainer):
    """Distillation on answers that the student writes itself (Agarwal et al. 2024, GKD), the teacher asked about each.

    What is overridden, and the fault of TRL 1.16.0 that it mends:
    `__init__`: knows one teacher and refuses vocabularies that are padded differently; here teachers are opened when
    they are asked, each fold's its own, and the ids that both know are compared.
    `get_batch_samples` (in `_Phase`): divides by the data set's labels, not by the tokens that were written; here all
    answers of an optimizer step are written before its first backward pass, and counted.
    `training_step`: draws from Python's global random state and writes one micro-batch at a time.
    `compute_loss` (in `_Phase`): drops the temperature, has no cross-entropy, jumps at the ends of beta, and runs both
    models over every position with full-vocabulary logits for the prompt.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        # the student stands in for the teacher, which is opened when it is asked: for each fold its own
        super().__init__(*args, teacher_model=kwargs["model"], **kwargs)
        self.live: dict[str, LabelModel] = {}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return Trainer.training_step(self, *args, **kwargs)

    def sample(self, picked: list[int], micro_batch: int) -> list[Completion] | None:
        # a function of the step alone, so that a resumed run writes what it would have written
        draw = np.random.default_rng([self.seed, self.state.global_step, micro_batch])
        if draw.random() >= self.spec.on_policy:
            return None
        written = self.student.generate_tokens(
            [self.ids[i] for i in picked],
            max_new_tokens=self.spec.max_new_tokens,
            temperature=self.spec.sampling_temperature,
            seed=int(draw.integers(2**31)),
            batch_size=len(picked),
        )
        return [(tokens, 0) for tokens in written]

    @torch.no_grad()
    def teacher_logprobs(self, picked: list[int], sampled: list[Completion] | None) -> list[torch.Tensor]:
        """As above, for tokens that the student wrote; gold rows go to the model that did not learn from them."""
        if sampled is None:
            return super().teacher_logprobs(picked, sampled)
        out = []
        for name in self.spec.teachers:
            parts: list[torch.Tensor] = [torch.empty(0)] * len(picked)
            folds = [self.rows.teacher_folds[name][i] if self.rows.teacher_folds else -1 for i in picked]
            for k in sorted(set(folds)):
                key = f"{name}/{k}"
                if key not in self.live:
                    self.live[key] = self.open(name, k)
                mine = [j for j, fold in enumerate(folds) if fold == k]
                ids = self.live[key].encode([self.rows.texts[picked[j]] for j in mine])
                told = self.live[key].forward(ids, [[sampled[j]] for j in mine], label_space=False).completion_logits
                lengths = [len(sampled[j][0]) for j in mine]
                for j, part in zip(mine, told.log_softmax(-1).split(lengths), strict=True):
                    parts[j] = part
            out.append(torch.cat(parts))
        return out


class ProgressPrinter(TrainerCallback):
    """A line now and then: under papermill every redraw of a bar would become a line of the notebook."""

    def __init__(self, title: str):
        self.title = title

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs and state.global_step % max(LOG_EVERY, state.max_steps // 80 * 10) == 0:
            print(f"{self.title}: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}", flush=True)


def count_optimizer_steps(rows: int, spec: TrainingConfig) -> int:
    """Optimizer steps of a phase on `rows` rows; the last, smaller batch of an epoch counts."""
    if spec.steps:
        return spec.steps
    return max(1, math.ceil(spec.epochs * math.ceil(math.ceil(rows / spec.batch_size) / spec.accumulate)))


def build_trainer(
    student: LabelModel,
    rows: TrainingRows,
    spec: TrainingConfig,
    *,
    folder: Path,
    seed: int,
    title: str,
    checkpoint_every: int,
    validation: TrainingRows | None = None,
    teachers: dict[str, OpenableTeacher] | None = None,
) -> PhaseTrainerMixin:
    """The trainer of a phase, its teachers already asked; see :func:`train_phase`."""
    stopping = getattr(spec, "early_stopping", None)
    steps = count_optimizer_steps(len(rows), spec)
    every = stopping.every if stopping else checkpoint_every
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": spec.batch_size,
        "gradient_accumulation_steps": spec.accumulate,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant_with_warmup" if spec.schedule == "constant" else spec.schedule,
        "warmup_steps": int(spec.warmup * steps),
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "seed": seed,
        "data_seed": seed,
        # a checkpoint falls on a logged step, or a resumed run would average the loss over fewer steps
        "logging_steps": math.gcd(min(LOG_EVERY, steps), every),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": every,
        "save_total_limit": 2,
        "eval_strategy": "steps" if stopping else "no",
        "eval_steps": every if stopping else None,
        "load_best_model_at_end": bool(stopping),
        "metric_for_best_model": stopping.metric if stopping else None,
        "greater_is_better": stopping.metric != "loss" if stopping else None,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # LabelModel.autocast decides; float16's small gradients also need to be scaled up, which CPUs cannot do
        "bf16": False,
        "fp16": student.dtype == torch.float16 and student.device.type == "cuda",
        "gradient_checkpointing": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
    }
    data = Dataset.from_dict({"index": list(range(len(rows)))})
    wiring: dict[str, Any] = {
        "model": student.model,
        "train_dataset": data,
        "eval_dataset": data if stopping else None,
        "data_collator": lambda batch: {"index": torch.tensor([row["index"] for row in batch])},
        "callbacks": [ProgressPrinter(title)] + ([EarlyStoppingCallback(stopping.patience)] if stopping else []),
    }
    if student.arch == "causal":
        wiring["processing_class"] = student.tokenizer
        common |= {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        if getattr(spec, "on_policy", 0):
            trainer = OnPolicyTrainer(args=GKDConfig(**common, disable_dropout=False), **wiring)
        else:
            trainer = CausalTrainer(args=SFTConfig(**common), **wiring)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                # TRL narrows the adapters of a 4-bit model to bfloat16, where a small update rounds to none
                weight.data = weight.data.float()
    else:
        trainer = EncoderTrainer(args=TrainingArguments(**common), **wiring)
    trainer.remove_callback(PrinterCallback)
    trainer.prepare(student, rows, spec, seed, validation, teachers)
    return trainer
