"""What keeping a teacher's signals costs on the disk, and what it costs in the loss.

    PYTHONPATH=src python benchmarks/signal_cache.py [training steps of the student, 12 by default]

Teacher: SmolLM2-135M. Student: its first 15 layers, as they are and after some steps on these very rows: an untrained
one is so far off that anything compared with it looks small. 24 rows of the finance corpus, each with its label and
its rationale, in float32. Everything is computed and stored as in a training, and the loss (`kl`) of what lies on the
disk is compared with the loss of the full distributions in float32.

Prints a markdown table a student. Error: sum |KL - KL of what is kept| / sum KL over the positions. "plain": the top-k
probabilities scaled to a sum of 1, ids in four bytes and probabilities in two; "-": a phase with `top_k` takes no other
temperature than 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from smollm2 import HALF_STUDENT
from torch import Tensor

from distillery import losses
from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import load_task
from distillery.training.rows import TrainingRows
from distillery.training.run import train_phase
from distillery.training.student import build_student
from distillery.training.teacher_outputs import TeacherOutputs, collect_teacher_outputs

ROWS, PART, TEMPERATURES = 24, 4, (1.0, 2.0, 5.0)
PLAIN = (16, 64)  # tokens
KEPT = ((15, 0), (15, 22), (63, 0), (63, 94))  # `top_k` and `tail_samples`; with samples the bytes of `PLAIN`
KINDS = ("label", "rationale")
# rows, the student's logits, the teacher's, temperature -> a value a position
Loss = Callable[[list[int], Tensor, Tensor, float], Tensor]


def train(student: LabelModel, rows: TrainingRows, steps: int, folder: Path) -> None:
    phase = {
        "data": ["finance/train"],
        "loss": {"ce": 0.5, "rationale": 0.5},
        "steps": steps,
        "batch_size": 8,
        "learning_rate": 2.0e-3,
    }
    train_phase(student, rows, PhaseConfig.model_validate(phase), folder=folder, seed=0, checkpoint_every=10**6)


class Positions:
    """The supervised positions of all rows, a few rows at a time."""

    def __init__(self, rows: TrainingRows, model: LabelModel):
        self.ids = model.encode(rows.texts)
        pairs = zip(rows.targets, rows.rationales, strict=True)
        self.completions = [model.row_completions(int(target), rationale) for target, rationale in pairs]
        self.parts = [list(range(a, min(a + PART, len(rows)))) for a in range(0, len(rows), PART)]

    def logits(self, model: LabelModel) -> list[Tensor]:
        """[m, vocabulary] a part, float32."""
        model.model.eval()
        with torch.no_grad():
            return [
                model.forward(
                    [self.ids[i] for i in part], [self.completions[i] for i in part], label_space=False
                ).completion_logits
                for part in self.parts
            ]

    def of(self, part: list[int]) -> dict[str, Tensor]:
        """Which positions of a part belong to the answer, and which to the reason after it."""
        of_row = [(len(answer) - a, len(why) - b) for (answer, a), (why, b) in (self.completions[i] for i in part)]
        reason = torch.tensor([kind for lengths in of_row for kind in (0, 1) for _ in range(lengths[kind])]) == 1
        return {"label": ~reason, "rationale": reason}


def vocabulary_errors(
    positions: Positions, student: list[Tensor], teacher: list[Tensor], loss: Loss, temperatures: tuple[float, ...]
) -> dict[tuple[str, float], float]:
    """The relative error of `loss`, by position and temperature."""
    apart: dict[tuple[str, float], list[float]] = {}
    for part, student_logits, full in zip(positions.parts, student, teacher, strict=True):
        for temperature in temperatures:
            exact = losses.kl(student_logits, full, temperature)
            wrong = (loss(part, student_logits, full, temperature) - exact).abs()
            for kind, mask in positions.of(part).items():
                sums = apart.setdefault((kind, temperature), [0.0, 0.0])
                sums[0] += wrong[mask].double().sum().item()
                sums[1] += exact[mask].double().sum().item()
    return {key: error / whole for key, (error, whole) in apart.items()}


def whole(stored: TeacherOutputs) -> Loss:
    return lambda part, student, full, temperature: losses.kl(student, stored.logprobs(part), temperature)


def plain(k: int) -> Loss:
    def loss(part: list[int], student: Tensor, full: Tensor, temperature: float) -> Tensor:
        values, indices, _ = losses.to_top_k(full, k)
        values = values.log_softmax(-1)
        return (values.exp() * (values - student.log_softmax(-1).gather(1, indices))).sum(-1)

    return loss


def packed_loss(stored: TeacherOutputs, samples: int) -> Loss:
    def loss(part: list[int], student: Tensor, full: Tensor, temperature: float) -> Tensor:
        if not samples:
            return losses.kl_top_k(student, *stored.top_k(part))
        return losses.kl_sampled_rest(student, *stored.top_k(part), *stored.rest(part))

    return loss


def label_errors(positions: Positions, student: LabelModel, teacher: LabelModel, rows: TrainingRows):
    """The same in the space of the labels, kept as a row of float32 probabilities; and its bytes a row."""
    stored = teacher.predict(rows.texts)
    student_logits, full = [], []
    with torch.no_grad():
        for part in positions.parts:
            ids = [positions.ids[i] for i in part]
            student_logits.append(student.forward(ids).label_logits)
            full.append(teacher.forward(ids).label_logits.double().log_softmax(-1))
    student_logits, full = torch.cat(student_logits), torch.cat(full)
    errors = {}
    for temperature in TEMPERATURES:
        exact = losses.kl(student_logits.double(), full, temperature)
        wrong = (losses.kl(student_logits, torch.from_numpy(stored).log(), temperature) - exact).abs()
        errors["label", temperature] = (wrong.sum() / exact.sum()).item()
    return errors, stored.nbytes / len(rows)


def line(name: str, size: float, errors: dict[tuple[str, float], float]) -> str:
    cells = [f"{8 * size:,.0f}"]
    for kind in KINDS:
        for temperature in TEMPERATURES:
            error = errors.get((kind, temperature))
            cells.append("-" if error is None else f"{error:.1%}" if error >= 5e-4 else f"{error:.0e}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main(steps: int = 12) -> None:
    folder = fetch_model("smollm2", load_params().models["smollm2"])
    task = load_task("finance-sentiment", repository_root() / "tasks")
    examples = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()[:ROWS]
    examples = [json.loads(row) for row in examples]
    targets = np.array([task.names.index(row["label"]) for row in examples])
    rows = TrainingRows([row["text"] for row in examples], targets, rationales=[row["rationale"] for row in examples])
    teacher = LabelModel(load_model(folder, "causal"), load_tokenizer(folder), task, "causal", prompt="plain")
    positions = Positions(rows, teacher)
    with tempfile.TemporaryDirectory() as scratch:
        stored = {
            (k, samples): collect_teacher_outputs(
                Path(scratch) / f"{k}-{samples}",
                lambda fold: teacher,
                rows.texts,
                fold=[-1] * ROWS,
                completions=lambda model: positions.completions,
                top_k=k,
                tail_samples=samples,
            )
            for k, samples in ((None, 0), *KEPT)
        }
        full = [logits.log_softmax(-1) for logits in positions.logits(teacher)]
        counts = [sum(int(positions.of(part)[kind].sum()) for part in positions.parts) for kind in KINDS]
        print(f"{ROWS} rows: {counts[0]} positions of labels, {counts[1]} of rationales, {full[0].shape[1]:,} tokens")
        student = build_student(StudentConfig.model_validate(HALF_STUDENT), folder, task, 0)
        for trained in (0, steps):
            if trained:
                train(student, rows, trained, Path(scratch) / "run")
            student_logits = positions.logits(student)
            print(f"\nStudent after {trained} steps\n")
            at = [f"{kind}, T = {temperature:g}" for kind in KINDS for temperature in TEMPERATURES]
            print(f"| kept | bits a token | {' | '.join(at)} |")
            print("|---|" + "---:|" * (1 + len(at)))
            errors, size = label_errors(positions, student, teacher, rows)
            print(line("labels, exact (bits a row)", size, errors))
            dense = stored[None, 0]
            methods = {"vocabulary, float16": (dense.bytes_a_token, whole(dense), TEMPERATURES)}
            methods |= {f"plain top {k}": (6 * k, plain(k), (1.0,)) for k in PLAIN}
            for k, samples in KEPT:
                rest = f"{samples} tokens drawn from the rest" if samples else "the rest as one"
                packed = stored[k, samples]
                methods[f"top {k}, {rest}"] = (packed.bytes_a_token, packed_loss(packed, samples), (1.0,))
            for name, (size, loss, temperatures) in methods.items():
                print(
                    line(name, size, vocabulary_errors(positions, student_logits, full, loss, temperatures)), flush=True
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
