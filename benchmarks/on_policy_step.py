"""One on-policy step: TRL's GKDTrainer and DistillationTrainer against this repository's trainer, side by side.

    PYTHONPATH=src python benchmarks/on_policy_step.py [rounds, 2 by default]

The models, prompts, divergence, batch and precision are those of `distill_step.py`. The student writes an answer of 24
tokens for each prompt of a batch (temperature 1; nobody may stop earlier, so that all train on as many tokens), the
teacher scores its tokens, and the student learns from the teacher's distribution. TRL's students have adapters in
bfloat16, since both its trainers fail with float32 adapters on a bfloat16 model. The three trainers alternate in one
process; each builds its models anew every round, and a round's first step is not counted.

Prints the loss of DistillationTrainer and of Distillery on the same answers, then seconds a step, tokens a second and
peak memory of each trainer, and last `ratio_gkd:` and `ratio:` (DistillationTrainer), seconds over Distillery's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset
from distill_step import BATCH, Clock, Measured, matrix_peak, peak, reset_peak, rows_of, student_of, teacher_of
from transformers import PrinterCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from distillery import losses
from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.tasks.schema import Task, load_task
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.trainers import build_trainer

NEW_TOKENS, STEPS, BETA = 24, 5, 0.5
COMMON = {
    "per_device_train_batch_size": BATCH,
    "max_steps": STEPS,
    "learning_rate": 1e-4,
    "beta": BETA,
    "temperature": 1.0,
    "use_cpu": not torch.cuda.is_available(),
    "bf16": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


def never_stop(model: LabelModel) -> None:
    """Take the model's end token out of reach, so that every answer has `NEW_TOKENS` tokens."""
    model.model.generation_config.eos_token_id = None
    model.tokenizer.eos_token_id = len(model.tokenizer) - 1


def models_of(folder: Path, task: Task) -> tuple[LabelModel, LabelModel]:
    student, teacher = student_of(folder, task), teacher_of(folder, task)
    for model in (student, teacher):
        never_stop(model)
    return student, teacher


def models_for_trl(folder: Path, task: Task) -> tuple[LabelModel, LabelModel]:
    """With adapters in bfloat16: TRL generates outside autocast, where float32 adapters do not fit a bfloat16 model."""
    student, teacher = models_of(folder, task)
    student.model.bfloat16()
    return student, teacher


def gkd_trainer(folder: Path, task: Task, output: str, clock: Clock) -> GKDTrainer:
    student, teacher = models_for_trl(folder, task)
    arguments = GKDConfig(output_dir=output, lmbda=1.0, max_new_tokens=NEW_TOKENS, max_length=1024, **COMMON)
    return GKDTrainer(
        model=student.model, teacher_model=teacher.model, args=arguments, train_dataset=rows_of(task, False)[1],
        processing_class=student.tokenizer, callbacks=[clock],
    )  # fmt: skip


def distillation_trainer(folder: Path, task: Task, output: str, clock: Clock) -> DistillationTrainer:
    student, teacher = models_for_trl(folder, task)
    prompts = [turns[:-1] for turns in rows_of(task, False)[1]["messages"]]
    arguments = DistillationConfig(output_dir=output, max_completion_length=NEW_TOKENS, **COMMON)
    return DistillationTrainer(
        model=student.model, teacher_model=teacher.model, args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=student.tokenizer, callbacks=[clock],
    )  # fmt: skip


def own_trainer(folder: Path, task: Task, output: str, clock: Clock):
    student, teacher = models_of(folder, task)
    phase = PhaseConfig.model_validate(
        {
            "data": ["finance/train"],
            "teachers": ["smollm2"],
            "loss": {"jsd": 1.0},
            "beta": BETA,
            "space": "vocabulary",
            "on_policy": 1.0,
            "max_new_tokens": NEW_TOKENS,
            "batch_size": BATCH,
            "steps": STEPS,
            "learning_rate": 1e-4,
        }
    )
    openable = OpenableTeacher(lambda fold: teacher, "smollm2", 30, Path(output) / "signals")
    trainer = build_trainer(
        student, rows_of(task, False)[0], phase, folder=Path(output) / "run", seed=0, title="distillery",
        checkpoint_every=10**6, teachers={"smollm2": openable},
    )  # fmt: skip
    trainer.add_callback(clock)
    return trainer


TRAINERS = {"TRL GKDTrainer": gkd_trainer, "TRL DistillationTrainer": distillation_trainer, "distillery": own_trainer}


def compare_losses(folder: Path, task: Task) -> None:
    """The loss of DistillationTrainer and Distillery's, in float32, on answers that TRL's student wrote."""
    with tempfile.TemporaryDirectory() as output:
        trl = distillation_trainer(folder, task, output, Clock())
        own = own_trainer(folder, task, output, Clock())
        for trainer in (trl, own):
            trainer.model.eval()
            trainer.model.float()
        trl.teacher_model.float()
        batch = trl._generate_and_score_completions([trl.train_dataset[i] for i in range(BATCH)])
        answers = batch["completion_ids"]
        with torch.no_grad():
            trl_loss, _, _ = trl._compute_loss(trl.accelerator.unwrap_model(trl.model), batch, answers.numel())
        student, (_, teacher) = own.student, models_of(folder, task)
        for model in (student, teacher):
            model.model.float()
            model.dtype = torch.float32
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        completions = [[(tokens.tolist(), 0)] for tokens in answers]
        with torch.no_grad():
            student_logits, teacher_logits = (
                model.forward(prompts, completions, label_space=False).completion_logits for model in (student, teacher)
            )
        own_loss = losses.jsd(student_logits, teacher_logits.log_softmax(-1), beta=BETA).mean().item()
    apart = abs(trl_loss.item() - own_loss) / own_loss
    print(
        f"loss of the same {answers.numel()} tokens in float32: DistillationTrainer {trl_loss.item():.6f}, "
        f"distillery {own_loss:.6f}, {apart:.0e} away\n"
    )


def measure(build, folder: Path, task: Task, measured: Measured) -> None:
    reset_peak()
    clock = Clock()
    with tempfile.TemporaryDirectory() as output:
        trainer = build(folder, task, output, clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    measured.seconds += np.diff(clock.ends).tolist()
    measured.peak = max(measured.peak, peak())


def main(rounds: int = 2) -> None:
    folder = fetch_model("smollm2", load_params().models["smollm2"])
    task = load_task("finance-sentiment", repository_root() / "tasks")
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16 products at "
        f"{matrix_peak() / 1e9:,.0f} GFLOP/s; {BATCH} rows a step, {NEW_TOKENS} tokens an answer"
    )
    compare_losses(folder, task)
    measured = {name: Measured() for name in TRAINERS}
    for _ in range(rounds):
        for name, build in TRAINERS.items():
            measure(build, folder, task, measured[name])
    own = median(measured["distillery"].seconds)
    for name, m in measured.items():
        step = median(m.seconds)
        print(
            f"{name:24s}{step:7.3f} s a step ({min(m.seconds):.3f} to {max(m.seconds):.3f}, n={len(m.seconds)}), "
            f"{BATCH * NEW_TOKENS / step:.1f} tokens/s, peak memory {m.peak / 2**30:.2f} GiB"
        )
    print(f"\nratio_gkd: {median(measured['TRL GKDTrainer'].seconds) / own:.2f}")
    print(f"ratio: {median(measured['TRL DistillationTrainer'].seconds) / own:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
