"""One distillation step: TRL's GKDTrainer against this repository's trainer, side by side.

    PYTHONPATH=src python benchmarks/distill_step.py [rounds, 2 by default]

The same teacher (SmolLM2-135M, 30 layers), student (its first 15, LoRA r=16 on all linear layers), rows, tokens,
divergence (JSD over the vocabulary, beta 0.5, T 1) at the same supervised positions, batch of 8, bfloat16, no gradient
checkpointing (TRL's default has it). Two workloads: the label alone, and the label with a rationale. The two trainers
alternate in one process; each builds its models anew every round, and a round's first step is not counted. Distillery
runs the teacher once on every row, which is counted at a third: three epochs share it.

Prints seconds a step, tokens a second, peak memory, the products' share of the machine's measured bfloat16 peak, the
losses of the first batches, and last `ratio_rationale:` and `ratio:` (labels).
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from datasets import Dataset
from measured import Clock, Measured, peak, reset_peak
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, PrinterCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.utils import DataCollatorForChatML

from distillery import losses
from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import Completion, LabelModel
from distillery.models.layers import configured_layers
from distillery.models.load import load_model, load_tokenizer
from distillery.models.packed.token_tree import common_prefix
from distillery.tasks.prompts import chat_turns
from distillery.tasks.schema import Task, load_task
from distillery.training.completions import StepCounts
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import TrainingRows
from distillery.training.student import build_student
from distillery.training.trainers import build_trainer

BATCH, EPOCHS, ROWS, STEPS = 8, 3, 96, {"trl": 4, "distillery": 11}
REASON = "\nBecause: "
# SmolLM2's own without its system turn, and without the new line after the last turn: an answer ends with its end token
TEMPLATE = (
    "{% for turn in messages %}{% if not loop.first %}\n{% endif %}<|im_start|>{{ turn.role }}\n{{ turn.content }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class ModelPair:
    """Folders of a teacher and of the model that its student begins as, and which of the latter's layers it keeps."""

    teacher: Path
    student: Path
    layers: str


class Whole(LabelModel):
    """Supervises answer and reason as one sequence, which is what TRL does."""

    def row_completions(self, label: int, rationale: str | None = None) -> list[Completion]:
        text = self.task.names[label] + (REASON + rationale if rationale else "")
        return [(self.tokenizer(text)["input_ids"] + [self.tokenizer.eos_token_id], 0)]


def matrix_peak() -> float:
    """Bfloat16 matrix products, FLOP/s, the best of several."""
    a, b = (torch.randn(2048, 2048, dtype=torch.bfloat16) for _ in range(2))
    best = 1e9
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def tokenizer_of(folder: Path):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def student_of(folder: Path, task: Task, layers: str = "first-15") -> LabelModel:
    spec = StudentConfig.model_validate(
        {
            "model": "smollm2",
            "arch": "causal",
            "init": {"layers": layers},
            "adapter": {"kind": "lora", "r": 16},
            "dtype": "bfloat16",
            "phases": [],
        }
    )
    built = build_student(spec, folder, task, 0)
    return Whole(built.model, tokenizer_of(folder), task, "causal", dtype="bfloat16")


def teacher_of(folder: Path, task: Task) -> LabelModel:
    return Whole(load_model(folder, "causal", dtype="bfloat16"), tokenizer_of(folder), task, "causal", dtype="bfloat16")


def rows_of(task: Task, rationales: bool) -> tuple[TrainingRows, Dataset]:
    lines = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    examples = [json.loads(line) for line in lines]
    texts, targets = [row["text"] for row in examples], np.array([task.names.index(row["label"]) for row in examples])
    reasons = [row["rationale"] for row in examples] if rationales else None
    messages = []
    for i, row in enumerate(examples):
        answer = row["label"] + (REASON + row["rationale"] if rationales else "")
        messages.append([*chat_turns(task, texts[i]), {"role": "assistant", "content": answer}])
    return TrainingRows(texts, targets, rationales=reasons), Dataset.from_dict({"messages": messages})


def with_trl(pair: ModelPair, task: Task, rationales: bool, measured: Measured, check: bool) -> None:
    reset_peak()
    _, data = rows_of(task, rationales)
    student, teacher = student_of(pair.student, task, pair.layers), teacher_of(pair.teacher, task)
    with tempfile.TemporaryDirectory() as output_folder:
        arguments = GKDConfig(
            output_dir=output_folder,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS["trl"],
            learning_rate=1e-4,
            lmbda=0.0,
            beta=0.5,
            temperature=1.0,
            use_cpu=student.device.type == "cpu",
            bf16=True,
            gradient_checkpointing=False,
            max_length=1024,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        clock = Clock()
        trainer = GKDTrainer(
            model=student.model,
            teacher_model=teacher.model,
            args=arguments,
            train_dataset=data,
            processing_class=student.tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        if check:
            student.model.eval()
            for a in range(0, 3 * BATCH, BATCH):
                batch = _moved(trainer.data_collator([data[i] for i in range(a, a + BATCH)]), student.device)
                measured.tokens += int((batch["labels"] != -100).sum()) / 3
            with FlopCounterMode(display=False) as counted:
                with torch.autocast(student.device.type, torch.bfloat16):
                    loss = trainer.compute_loss(trainer.model, batch)
                loss.backward()
            measured.flops = counted.get_total_flops()
            trainer.model.zero_grad()
        trainer.train()
    measured.seconds += np.diff(clock.ends).tolist()
    measured.peak = max(measured.peak, peak())


def with_distillery(pair: ModelPair, task: Task, rationales: bool, measured: Measured, check: bool) -> None:
    reset_peak()
    rows, _ = rows_of(task, rationales)
    phase = PhaseConfig.model_validate(
        {
            "data": ["finance/train"],
            "teachers": ["teacher"],
            "loss": {"jsd": 1.0},
            "space": "vocabulary",
            "rationales": rationales,
            "batch_size": BATCH,
            "steps": STEPS["distillery"],
            "learning_rate": 1e-4,
        }
    )
    with tempfile.TemporaryDirectory() as output_folder:
        depth = configured_layers(AutoConfig.from_pretrained(pair.teacher))
        open_teacher = partial(teacher_of, pair.teacher, task)
        teacher = OpenableTeacher(lambda fold: open_teacher(), "teacher", depth, Path(output_folder) / "signals")
        student = student_of(pair.student, task, pair.layers)
        start = time.perf_counter()
        open_teacher()
        opening = time.perf_counter() - start
        start = time.perf_counter()
        trainer = build_trainer(
            student,
            rows,
            phase,
            folder=Path(output_folder) / "run",
            seed=0,
            title="distillery",
            checkpoint_every=10**6,
            teachers={"teacher": teacher},
        )
        # opening the teacher is not asking it: TRL's trainer is not charged for that, either
        cache = (time.perf_counter() - start - opening) / (ROWS / BATCH)
        measured.cache = min(measured.cache or cache, cache)
        clock = Clock()
        trainer.add_callback(clock)
        if check:
            student.model.eval()
            for a in range(0, 3 * BATCH, BATCH):
                batch = trainer.completions.micro_batch(list(range(a, a + BATCH)))
                trainer.counts = StepCounts.of([batch])
                measured.tokens += trainer.counts.compared_tokens / 3
            with FlopCounterMode(display=False) as counted:
                trainer.compute_loss(trainer.model, {"micro_batch": batch}).backward()
            measured.flops = counted.get_total_flops()
            trainer.model.zero_grad()
            trainer.term_values.clear()
        trainer.train()
        if check:
            size = trainer.signals.outputs["teacher"].bytes_a_token
            print(f"  signals: {size:,.0f} bytes a supervised token on the disk")
    measured.seconds += np.diff(clock.ends).tolist()
    measured.peak = max(measured.peak, peak())


def compare_losses(pair: ModelPair, task: Task, rationales: bool) -> dict[str, float]:
    """TRL's loss and Distillery's of three batches, in float32 and in bfloat16. TRL takes the log-softmax in the
    precision of the logits, so its formula on logits widened to float32 is shown, too. Returns the largest relative
    difference from the latter in each precision."""
    rows, data = rows_of(task, rationales)
    student, teacher = student_of(pair.student, task, pair.layers), teacher_of(pair.teacher, task)
    collate = DataCollatorForChatML(tokenizer=student.tokenizer, max_length=1024)
    completions = [
        student.row_completions(int(t), r) for t, r in zip(rows.targets, rows.rationales or [None] * ROWS, strict=True)
    ]
    ids, differences = student.encode(rows.texts), {}
    for dtype in (torch.bfloat16, torch.float32):
        values: dict[str, list[float]] = {"TRL": [], "TRL on float32 logits": [], "distillery": []}
        for model in (student, teacher):
            model.model.to(dtype).eval()
            model.dtype = dtype
        for a in range(0, 3 * BATCH, BATCH):
            batch = _moved(collate([data[i] for i in range(a, a + BATCH)]), student.device)
            with torch.no_grad():
                with torch.autocast(student.device.type, dtype, enabled=dtype != torch.float32):
                    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
                    supervised = batch["labels"][:, 1:] != -100
                    logits = [model.model(**inputs).logits[:, :-1][supervised] for model in (student, teacher)]
                values["TRL"].append(GKDTrainer.generalized_jsd_loss(*logits).item())
                wide = GKDTrainer.generalized_jsd_loss(*(x.float() for x in logits))
                values["TRL on float32 logits"].append(wide.item())
                student_logits, teacher_logits = (
                    m.forward(ids[a : a + BATCH], completions[a : a + BATCH], label_space=False).completion_logits
                    for m in (student, teacher)
                )
                values["distillery"].append(losses.jsd(student_logits, teacher_logits.log_softmax(-1)).mean().item())
        shown = "; ".join(f"{name} {_shown(of_batches)}" for name, of_batches in values.items())
        apart = [
            max(abs(a - b) / abs(a) for a, b in zip(values[n], values["distillery"], strict=True))
            for n in list(values)[:2]
        ]
        print(f"  losses, {str(dtype)[6:]}: {shown}; distillery is {apart[0]:.0e} and {apart[1]:.0e} away")
        differences[str(dtype)[6:]] = apart[1]
    return differences


def main(rounds: int = 2) -> None:
    folder = fetch_model("smollm2", load_params().models["smollm2"])
    compare_steps(ModelPair(folder, folder, "first-15"), rounds)


def compare_steps(pair: ModelPair, rounds: int) -> None:
    """Measure both trainers on both workloads, and print the figures and ratios."""
    task = load_task("finance-sentiment", repository_root() / "tasks")
    speed = matrix_peak()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16 products at {speed / 1e9:,.0f} GFLOP/s"
    )
    ratios = {}
    for workload in ("label", "rationale"):
        trl, distillery = Measured(), Measured()
        prompts = student_of(pair.student, task, pair.layers).encode(rows_of(task, False)[0].texts)
        print(
            f"\n{workload}: {ROWS} rows, prompts of {np.mean([len(p) for p in prompts]):.0f} tokens, "
            f"of which all begin with the same {common_prefix(prompts)}"
        )
        compare_losses(pair, task, workload == "rationale")
        for k in range(rounds):
            with_trl(pair, task, workload == "rationale", trl, check=k == 0)
            with_distillery(pair, task, workload == "rationale", distillery, check=k == 0)
        for name, m in (("TRL GKDTrainer", trl), ("distillery", distillery)):
            step = median(m.seconds)
            spread = f"{min(m.seconds):.3f} to {max(m.seconds):.3f}, n={len(m.seconds)}"
            print(
                f"  {name:15s}{step:7.3f} s a step ({spread}), {m.tokens / step:.1f} supervised tokens/s, "
                f"peak memory {m.peak / 2**30:.2f} GiB, {m.flops / 1e9:,.0f} GFLOP a step: "
                f"{m.flops / step / speed:.0%} of the peak"
            )
        once, shared = distillery.cache, distillery.cache / EPOCHS
        print(f"  the teacher's signals: {once:.3f} s a batch once, {shared:.3f} s over {EPOCHS} epochs")
        print(f"  peak memory: {distillery.peak / trl.peak:.2f} of TRL's")
        ratios[workload] = median(trl.seconds) / (median(distillery.seconds) + distillery.cache / EPOCHS)
    print(f"\nratio_rationale: {ratios['rationale']:.2f}")
    print(f"ratio: {ratios['label']:.2f}")


def _moved(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in batch.items()}


def _shown(values: list[float]) -> str:
    return ", ".join(f"{value:.5f}" for value in values)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
