"""One step of patient distillation: a plain Trainer that runs its teacher online against this repository's trainer.

    PYTHONPATH=src python benchmarks/classifier_step.py [rounds, 3 by default]

The same teacher (MiniLM, 6 layers), student (its layers 0, 2 and 5), rows of the finance corpus, loss (cross-entropy,
KL over the labels at T 2, PKD on the [CLS] states, rule `skip`), batch of 16 and bfloat16 products for both. The plain
one is what a user would write: a `compute_loss` that runs the teacher on each batch, batches drawn at random and
padded to their longest row. Distillery runs the teacher once on every row; three epochs share what that takes. The two
alternate in one process; each builds its models anew every round, and a round's first step is not counted. The heads
of teacher and student are drawn, not trained: that changes no time.

Prints how many of the student's words occur at all (no other is trained), seconds a step, sentences a second, peak
memory, the products' share of the machine's measured bfloat16 peak, where a step's time goes, the losses of the first
batches, and last `ratio:`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from distill_step import Clock, Measured, matrix_peak, peak, reset_peak
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from distillery import losses
from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import Task, load_task
from distillery.training.completions import StepCounts
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import TrainingRows
from distillery.training.student import build_student
from distillery.training.trainers import PhaseTrainerMixin, build_trainer

BATCH, EPOCHS, ROWS, STEPS, CHECKED = 16, 3, 320, {"plain": 11, "distillery": 21}, 3
LOSS, TEMPERATURE = {"ce": 0.5, "kl": 0.5, "pkd": 1.0}, 2.0
LAYERS = [0, 2, 5]
KINDS = {  # what an operator's time is spent on
    "matrix products": ("mm", "linear", "matmul", "scaled_dot_product", "flash"),
    "optimizer and gradient norm": ("adam", "foreach", "norm"),
    "copies and casts": ("copy", "_to_copy", "cat", "stack", "clone"),
    "zero_, fill_, embedding": ("zero", "fill", "embedding", "index"),
}


@dataclass
class CheckedRun(Measured):
    losses: list[float] = field(default_factory=list)


class OnlineTrainer(Trainer):
    """A teacher beside the student in every step."""

    def __init__(self, *args: Any, teacher: torch.nn.Module, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval()
        depths = (net.config.num_hidden_layers for net in (self.model, teacher))
        self.pairs = losses.pair_layers(*depths, "skip")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            teacher_output = self.teacher(**inputs, output_hidden_states=True)
        student_output = model(**inputs, output_hidden_states=True)
        student_states = torch.stack([student_output.hidden_states[j][:, 0] for j, _ in self.pairs], 1)
        teacher_states = torch.stack([teacher_output.hidden_states[j][:, 0] for _, j in self.pairs], 1)
        loss, _ = losses.combine_terms(
            {term: weight for term, weight in LOSS.items() if term != "pkd"},
            student_output.logits,
            targets=labels,
            teacher_logprobs=teacher_output.logits.float().log_softmax(-1),
            temperature=TEMPERATURE,
            denominator=len(labels),
        )
        loss = loss + LOSS["pkd"] * losses.pkd(student_states, teacher_states).mean()
        return (loss, student_output) if return_outputs else loss


class Profiler(TrainerCallback):
    """Operators' own seconds a step, from the end of the 2nd step to the end of the last."""

    def __init__(self, steps: int) -> None:
        self.steps, self.wall = steps, 0.0
        self.watch = profile(activities=[ProfilerActivity.CPU])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.watch.start()
            self.wall = time.perf_counter()
        elif state.global_step == self.steps:
            self.wall = time.perf_counter() - self.wall
            self.watch.stop()

    def shown(self) -> str:
        spent: Counter[str] = Counter()
        for event in self.watch.key_averages():
            kind = next((kind for kind, words in KINDS.items() if any(w in event.key.lower() for w in words)), "others")
            spent[kind] += event.self_cpu_time_total / 1e6
        spent["outside operators"] = self.wall - spent.total()
        return ", ".join(f"{kind} {s / self.wall:.0%}" for kind, s in spent.most_common())


def teacher_of(folder: Path, task: Task, dtype: str) -> LabelModel:
    model = load_model(folder, "classifier", labels=task.names, seed=1)
    return LabelModel(model, load_tokenizer(folder), task, "classifier", dtype=dtype)


def student_of(folder: Path, task: Task, dtype: str) -> LabelModel:
    spec = {"model": "minilm-l6", "arch": "classifier", "init": {"layers": LAYERS}, "dtype": dtype, "phases": []}
    return build_student(StudentConfig.model_validate(spec), folder, task, 0)


def rows_of(task: Task, n: int | None = ROWS) -> TrainingRows:
    lines = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:n]
    examples = [json.loads(line) for line in lines]
    targets = np.array([task.names.index(row["label"]) for row in examples])
    return TrainingRows([row["text"] for row in examples], targets)


def plain(
    folder: Path, task: Task, scratch: Path, dtype: str, steps: int, callbacks: list[TrainerCallback]
) -> OnlineTrainer:
    rows, teacher, student = rows_of(task), teacher_of(folder, task, dtype), student_of(folder, task, dtype)
    encoded = student.tokenizer(rows.texts, truncation=True)["input_ids"]
    arguments = TrainingArguments(
        output_dir=str(scratch / "plain"),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=1e-4,
        use_cpu=True,
        bf16=dtype == "bfloat16",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = OnlineTrainer(
        model=student.model,
        teacher=teacher.model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": encoded, "labels": rows.targets.tolist()}),
        data_collator=DataCollatorWithPadding(student.tokenizer),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def distillery(
    folder: Path, task: Task, scratch: Path, dtype: str, steps: int, callbacks: list[TrainerCallback]
) -> tuple[PhaseTrainerMixin, float]:
    """The trainer, and the seconds that the teacher's predictions took."""
    rows, teacher = rows_of(task), teacher_of(folder, task, dtype)
    student = student_of(folder, task, dtype)
    phase = {
        "data": ["finance/train"],
        "teachers": ["minilm-l6"],
        "loss": LOSS,
        "temperature": TEMPERATURE,
        "layers": "skip",
        "batch_size": BATCH,
        "steps": steps,
        "learning_rate": 1e-4,
    }
    teachers = [teacher]
    white_box = OpenableTeacher(
        lambda fold: teachers.pop(), ["minilm-l6", dtype], teacher.model.config.num_hidden_layers, scratch / "signals"
    )
    start = time.perf_counter()
    rows.logprobs = torch.from_numpy(teacher.predict(rows.texts)).log()
    rows.teacher_weights = {"minilm-l6": torch.ones(len(rows), dtype=torch.double)}
    del teacher  # it has no part in the training
    trainer = build_trainer(
        student,
        rows,
        PhaseConfig.model_validate(phase),
        folder=scratch / "distillery",
        seed=0,
        title="distillery",
        checkpoint_every=10**6,
        teachers={"minilm-l6": white_box},
    )
    seconds = time.perf_counter() - start
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer, seconds


def first_losses(trainer: Any, picked: list[list[int]]) -> list[float]:
    """The losses of the same rows, dropout off."""
    trainer.model.eval()
    values = []
    for rows in picked:
        with torch.no_grad():
            values.append(loss_of(trainer, rows).item())
    return values


def loss_of(trainer: Any, rows: list[int]) -> torch.Tensor:
    if isinstance(trainer, OnlineTrainer):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):  # which `train` would switch on
            return trainer.compute_loss(trainer.model, batch)
    batch = trainer.completions.micro_batch(rows)
    trainer.counts = StepCounts.of([batch])
    return trainer.compute_loss(trainer.model, {"micro_batch": batch})


def examine(trainer: Any, measured: CheckedRun) -> None:
    """Losses of the first rows, and the products of batches that this trainer would draw."""
    measured.losses = first_losses(trainer, [list(range(a, a + BATCH)) for a in range(0, CHECKED * BATCH, BATCH)])
    order = list(trainer._get_train_sampler(trainer.train_dataset))
    with FlopCounterMode(display=False) as counted:
        for a in range(0, CHECKED * BATCH, BATCH):
            loss_of(trainer, order[a : a + BATCH]).backward()
    measured.flops = counted.get_total_flops() / CHECKED
    trainer.model.zero_grad()
    if hasattr(trainer, "term_values"):
        trainer.term_values.clear()


def main(rounds: int = 3) -> None:
    folder = fetch_model("minilm-l6", load_params().models["minilm-l6"])
    task = load_task("finance-sentiment", repository_root() / "tasks")
    tokenizer = load_tokenizer(folder)
    words = [len({i for row in tokenizer(rows_of(task, n).texts)["input_ids"] for i in row}) for n in (ROWS, None)]
    print(f"of {len(tokenizer):,} words {words[0]:,} occur in these {ROWS} rows, {words[1]:,} in the whole corpus")
    speed = matrix_peak()
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, bfloat16 products at {speed / 1e9:,.0f} GFLOP/s"
    )
    online, cached = CheckedRun(), CheckedRun()
    for k in range(rounds):
        for name, measured in (("plain", online), ("distillery", cached)):
            reset_peak()
            clock = Clock()
            with tempfile.TemporaryDirectory() as scratch:
                built = {"plain": plain, "distillery": distillery}[name](
                    folder, task, Path(scratch), "bfloat16", STEPS[name], [clock]
                )
                trainer, cache = built if name == "distillery" else (built, 0.0)
                if k == 0:
                    examine(trainer, measured)
                measured.cache = min(measured.cache or cache, cache / (ROWS / BATCH))
                trainer.train()
            measured.seconds += np.diff(clock.ends).tolist()
            measured.peak = max(measured.peak, peak())
            del built, trainer
    for name, m in (("online teacher", online), ("distillery", cached)):
        step = median(m.seconds)
        print(
            f"{name:15s}{step:7.3f} s a step ({min(m.seconds):.3f} to {max(m.seconds):.3f}, n={len(m.seconds)}), "
            f"{BATCH / step:.1f} sentences/s, peak memory {m.peak / 2**30:.2f} GiB, "
            f"{m.flops / 1e9:,.0f} GFLOP a step: {m.flops / step / speed:.0%} of the peak"
        )
    shared = cached.cache / EPOCHS
    print(f"the teacher's signals: {cached.cache:.3f} s a batch once, {shared:.3f} s over {EPOCHS} epochs")
    with tempfile.TemporaryDirectory() as scratch:
        for name, build in (("online teacher", plain), ("distillery", distillery)):
            watch = Profiler(8)
            built = build(folder, task, Path(scratch), "bfloat16", watch.steps, [watch])
            (built[0] if isinstance(built, tuple) else built).train()
            print(f"{name:15s}where its time goes: {watch.shown()}")
        single = [CheckedRun(), CheckedRun()]
        examine(plain(folder, task, Path(scratch), "float32", 1, []), single[0])
        examine(distillery(folder, task, Path(scratch), "float32", 1, [])[0], single[1])
    for dtype, (a, b) in (("bfloat16", (online, cached)), ("float32", single)):
        apart = max(abs(x - y) / abs(x) for x, y in zip(a.losses, b.losses, strict=True))
        shown = [", ".join(f"{value:.5f}" for value in m.losses) for m in (a, b)]
        print(f"losses of the first batches, {dtype}: online {shown[0]}; distillery {shown[1]}; {apart:.1e} apart")
    print(f"peak memory: {cached.peak / online.peak:.2f} of the online teacher's")
    print(f"\nratio: {median(online.seconds) / (median(cached.seconds) + shared):.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
