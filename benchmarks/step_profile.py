"""Where a training step's milliseconds go, and what each reduction of the code gains: all ways in turns, in one run.

    PYTHONPATH=src python benchmarks/step_profile.py [--rounds 5] [--batches 6]

The teacher of params.yaml (SmolLM2, adapters in its last layers) and the student half-kd (15 layers, with adapters in 4
bits) take steps of their own trainers on rows of the finance corpus, each as it is and without one reduction. Then a
student's loss over the vocabulary is computed in the ways that came one after the other, and MiniLM's layers 0, 2 and
5 take steps with all weights trained. Ways take turns over the same batches, in another order each round; the first
round compiles kernels and is left out. Printed: seconds a step (median; of the processor where there is one thread,
since other programs may run), the ratio with its range over the rounds, and the operators that take most of the time.

For the teacher also the share of the faster number format's speed that its step reaches: operations of its matrix
products (`operations.py`) in its seconds, beside a lone product of a layer's size (`default_run.product_speed`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from default_run import product_speed, seconds
from operations import count_operations
from peft.tuners.lora.layer import LoraLayer
from smollm2 import HALF_STUDENT, TUNED_TEACHER
from torch.profiler import ProfilerActivity, profile

from distillery import losses
from distillery.config.load import load_params
from distillery.config.schema import StudentConfig, TeacherConfig
from distillery.files import repository_root
from distillery.models.fast_cpu import train_used_embeddings, use_bit_dropout
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.layers import output_head, transformer_body
from distillery.models.packed import token_tree
from distillery.models.precision import DTYPES, resolve_dtype
from distillery.tasks.schema import Task, load_task
from distillery.training.adapters import SCALED
from distillery.training.completions import StepCounts
from distillery.training.rows import gold_rows
from distillery.training.student import attach_adapters, build_student
from distillery.training.teacher_models import load_teacher_model
from distillery.training.trainers import build_trainer

BATCH = 8  # rows of a step; the encoder has twice as many
Step = Callable[[list[list[int]], list[list[int]]], torch.Tensor]
Batches = list[list[int]]  # numbers of rows


def compare(title: str, ways: dict[str, Callable[[Any], None]], batches: list, rounds: int, chain: bool) -> dict:
    """Print and return the median seconds of each way's step, and how much faster a reduction makes it.

    chain: whether each way is compared with the one before it; else the first has all reductions, the others lack one.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(rounds + 1):
        order = list(ways.items())
        for name, step in order[round_number % len(order) :] + order[: round_number % len(order)]:
            start = seconds()
            for batch in batches:
                step(batch)
            times[name].append((seconds() - start) / len(batches))
    times = {name: values[1:] for name, values in times.items()}
    print(f"\n{title}")
    names = list(ways)
    for i, name in enumerate(names):
        line = f"  {name:<58} {statistics.median(times[name]):7.3f} s"
        if i:
            slow, fast = (names[i - 1], name) if chain else (name, names[0])
            ratios = sorted(a / b for a, b in zip(times[slow], times[fast], strict=True))
            line += f"  {statistics.median(ratios):5.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(line, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def operators(step: Callable[[Any], None], batches: list, *named: str) -> dict[str, float]:
    """Print the operators that take most of the time of `step`; returns the share of those `named`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for batch in batches[::2]:
            step(batch)
    averages = profiled.key_averages()
    whole = sum(op.self_cpu_time_total for op in averages)
    largest = sorted(averages, key=lambda op: -op.self_cpu_time_total)[:8]
    print("  " + ", ".join(f"{op.key} {op.self_cpu_time_total / whole:.0%}" for op in largest))
    return {name: sum(op.cpu_time_total for op in averages if op.key == name) / whole for name in named}


@contextmanager
def outputs_scaled(model: torch.nn.Module) -> Iterator[None]:
    """Adapters as peft has them: all outputs of a layer are multiplied."""
    original = {scaled: layer for layer, scaled in SCALED.items()}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and type(module) in original]
    for layer in layers:
        layer.__class__ = original[type(layer)]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = SCALED[type(layer)]


class TrainerStep:
    """A step of the trainer that trains `student` on `rows`, but for the optimizer's."""

    def __init__(self, student: LabelModel, rows: pd.DataFrame, phase: Any):
        training_rows = gold_rows(rows, student.task)
        if phase.teachers:  # its distributions decide no time
            training_rows.logprobs = torch.randn(len(rows), len(student.task.names)).log_softmax(-1)
        folder, settings = Path(tempfile.mkdtemp()), {"seed": 0, "title": "", "checkpoint_every": 1}
        self.trainer = build_trainer(student, training_rows, phase, folder=folder, **settings)
        self.student, self.kept_states = student, student.frozen_states
        student.model.train()

    def __call__(self, batch: list[int], frozen: bool = True) -> None:
        self.student.frozen_states = self.kept_states if frozen else None
        micro_batch = self.trainer.completions.micro_batch(batch)
        self.trainer.counts = StepCounts.of([micro_batch])
        self.trainer.compute_loss(self.trainer.model, {"micro_batch": micro_batch}).backward()
        self.student.model.zero_grad()

    def scaling_outputs(self, batch: list[int]) -> None:
        """The step with :func:`outputs_scaled`."""
        with outputs_scaled(self.student.model):
            self(batch)


def profile_teacher(rows: pd.DataFrame, batches: Batches, task: Task, rounds: int) -> None:
    """A step of SmolLM2 as a teacher that is tuned."""
    params, name = load_params(), "smollm2"
    spec, faster = TeacherConfig.model_validate(TUNED_TEACHER), resolve_dtype("auto", "training")
    steps = {}
    for dtype in sorted(DTYPES, key=lambda dtype: dtype != faster):
        fixed = spec.model_copy(update={"dtype": dtype})
        teacher = load_teacher_model(name, fixed, params.models[spec.model], task, use="training")
        teacher.model = attach_adapters(teacher.model, spec.finetune.lora, teacher.arch, spec.seed)
        steps[dtype] = TrainerStep(teacher, rows, spec.finetune.as_phase())
    step, other = steps.values()
    medians = compare(
        f"teacher {name}, {spec.finetune.lora.layers}, r = {spec.finetune.lora.r}: a step, and without one reduction",
        {
            f"as it is, {faster}": step,
            "the frozen layers in each step": lambda batch: step(batch, frozen=False),
            f"the other number format, {next(dtype for dtype in steps if dtype != faster)}": other,
            "adapters scale outputs": step.scaling_outputs,
        },
        batches,
        rounds,
        chain=False,
    )
    operators(step, batches)
    with count_operations() as counter:
        for batch in batches:
            step(batch)
    speed = counter.get_total_flops() / len(batches) / next(iter(medians.values())) / 1e9
    speeds = {dtype: product_speed(getattr(torch, dtype)) for dtype in DTYPES}
    share = speed / max(speeds.values())
    print(f"  {speed:.0f} GFLOP/s: {share:.0%} of a lone product's. A lone product: ", end="")
    print(", ".join(f"{value:.0f} GFLOP/s in {dtype}" for dtype, value in speeds.items()), flush=True)


def profile_half(rows: pd.DataFrame, batches: Batches, task: Task, rounds: int) -> None:
    """A step of the student half-kd with adapters, in 4 bits and in 16."""
    params = load_params()
    spec, steps = params.students["half-kd"], {}
    for kind in ("qlora", "lora"):
        adapted = spec.model_copy(update={"adapter": spec.adapter.model_copy(update={"kind": kind, "r": 16})})
        student = build_student(adapted, fetch_model(spec.model, params.models[spec.model]), task, 0)
        steps[kind] = TrainerStep(student, rows, spec.phases[0])
    medians = compare(
        "half-kd with adapters, 4 bits: a step, and without one reduction (16 bits: without the saving of memory)",
        {
            "as it is": steps["qlora"],
            "adapters scale outputs, and copy them": steps["qlora"].scaling_outputs,
            "frozen weights in 16 bits": steps["lora"],
        },
        batches,
        rounds,
        chain=False,
    )
    operators(steps["qlora"], batches)
    in_4_bits, in_16_bits = medians["as it is"], medians["frozen weights in 16 bits"]
    print(f"  dequantizing: {1 - in_16_bits / in_4_bits:.0%} of the step, by the difference from 16 bits", flush=True)


def ways(student: LabelModel) -> dict[str, Step]:
    """Name -> logits [answer tokens, vocabulary] of rows (prompts, answers), in the order of the changes."""
    model = student.model

    def padded(prompts: list[list[int]], answers: list[list[int]]) -> tuple[dict, torch.Tensor]:
        rows = [p + a for p, a in zip(prompts, answers, strict=True)]
        batch = student.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        width = batch["input_ids"].shape[1]
        at = torch.tensor([[width - len(a) - 1 + k for k in range(len(a))] for a in answers])
        return batch, at

    def everywhere(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        logits = model(**batch).logits
        return torch.cat([logits[i, row] for i, row in enumerate(at)])

    def sliced(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        return model(**batch, logits_to_keep=at.shape[1] + 1).logits[:, :-1].flatten(0, 1)

    def gathered(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        batch, at = padded(prompts, answers)
        states = transformer_body(model)(**batch, use_cache=False).last_hidden_state
        return output_head(model)(torch.cat([states[i, row] for i, row in enumerate(at)]))

    def trees(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        return student.forward(prompts, [[(a, 0)] for a in answers], label_space=False).completion_logits

    def exact(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
        rounded, token_tree.LENGTH_MULTIPLES = token_tree.LENGTH_MULTIPLES, (1, 1)
        try:
            return trees(prompts, answers)
        finally:
            token_tree.LENGTH_MULTIPLES = rounded

    return {
        "logits at every position": everywhere,
        "logits_to_keep": sliced,
        "positions gathered before the head": gathered,
        "token trees: the shared prompt once, no padding": exact,
        "lengths rounded up, so that kernels are met again": trees,
    }


def encoder_step(rows: pd.DataFrame, task: Task, profiled: bool, bits: bool) -> Callable[[list[int]], None]:
    """A step of the encoder student on row numbers, its optimizer's too.

    profiled: whether embeddings of words that occur are trained alone. bits: whether dropout takes 16 bits an element.
    """
    spec = {"model": "minilm-l6", "arch": "classifier", "init": {"layers": [0, 2, 5]}, "dtype": "auto", "phases": []}
    folder = fetch_model("minilm-l6", load_params().models["minilm-l6"])
    student = build_student(StudentConfig.model_validate(spec), folder, task, 0)
    ids = student.encode(rows["text"].tolist())
    target = torch.tensor([task.names.index(label) for label in rows["label"]])
    if profiled:
        train_used_embeddings(student.model, {student.tokenizer.pad_token_id, *(t for row in ids for t in row)})
    if bits:
        use_bit_dropout(student.model)
    student.model.train()
    trained = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step(batch: list[int]) -> None:
        losses.cross_entropy(student.forward([ids[i] for i in batch]).label_logits, target[batch]).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def profile_encoder(rows: pd.DataFrame, by_length: list[int], task: Task, rounds: int) -> None:
    """Steps of the encoder student, each with one reduction more."""
    size = 2 * BATCH
    plain, used, bits = (encoder_step(rows, task, *settings) for settings in ((False,) * 2, (True, False), (True,) * 2))
    pairs = [(list(range(a, a + size)), by_length[a : a + size]) for a in range(0, len(rows) - size + 1, size)]
    ways = {
        "encoder, batches as they come": lambda pair: plain(pair[0]),
        "batches of like length": lambda pair: plain(pair[1]),
        "only embeddings of words that occur are trained": lambda pair: used(pair[1]),
        "16 random bits an element for dropout": lambda pair: bits(pair[1]),
    }
    compare(
        "student of three layers of MiniLM, all weights trained: each way after the one before",
        ways,
        pairs,
        rounds,
        True,
    )
    operators(ways["16 random bits an element for dropout"], pairs)


def profile_loss(rows: pd.DataFrame, batches: Batches, task: Task, rounds: int) -> None:
    """Steps of a causal student with a loss over the vocabulary, computed in one way after the other."""
    spec = StudentConfig.model_validate(HALF_STUDENT | {"dtype": "auto"})
    student = build_student(spec, fetch_model("smollm2", load_params().models["smollm2"]), task, 0)
    student.model.train()
    ids, answers = student.encode(rows["text"].tolist()), [student.label_completion(i % 3)[0] for i in range(BATCH)]
    teacher = torch.randn(sum(map(len, answers)), output_head(student.model).weight.shape[0]).log_softmax(-1)

    def step(way: Step) -> Callable[[list[int]], None]:
        def run(batch: list[int]) -> None:
            with student.autocast():
                logits = way([ids[i] for i in batch], answers)
            losses.jsd(logits, teacher).mean().backward()
            student.model.zero_grad()

        return run

    title = "student of 15 layers, JSD over the vocabulary: each way of its logits after the one before"
    compare(title, {name: step(way) for name, way in ways(student).items()}, batches, rounds, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=6)
    settings = parser.parse_args()
    root = repository_root()
    task, n_rows = load_task("finance-sentiment", root / "tasks"), BATCH * settings.batches
    lines = (root / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:n_rows]
    rows = pd.DataFrame([json.loads(line) for line in lines])
    by_length = sorted(range(n_rows), key=lambda i: len(rows["text"][i]))
    batches = [by_length[a : a + BATCH] for a in range(0, n_rows, BATCH)]
    print(f"{torch.get_num_threads()} threads, {n_rows} rows in {len(batches)} batches, {settings.rounds} rounds")
    profile_teacher(rows, batches, task, settings.rounds)
    profile_half(rows, batches, task, settings.rounds)
    profile_loss(rows, batches, task, settings.rounds)
    profile_encoder(rows, by_length, task, settings.rounds)


if __name__ == "__main__":
    main()
