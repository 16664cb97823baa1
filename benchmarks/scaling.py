"""Ten times the rows: are teacher and student ten times as long, and is their memory the same?

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/scaling.py [rows, 200 by default] [teacher, smollm2 by default]

A prompted SmolLM2 (or minilm-l6 with an untrained head) labels the rows of the finance corpus, and a student (MiniLM's
layers 0, 2 and 5) learns from its probabilities, three epochs in batches of 16. Each number of rows, and each of the
two, runs in a process of its own. The formula comes from the smaller run: seconds a row of the work, the larger run
takes ten times as long, and memory stays. What does not grow is not counted: loading a model, the comparison of methods
before the first batch, and the first two steps. Both runs begin with a batch of the corpus's longest texts, which few
rows may miss: memory is that of the longest batch.
The last lines plan a hundred times the rows by the same formula, without running them. It needs an idle machine.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from distillery.config.load import load_params
from distillery.config.schema import PhaseConfig, StudentConfig
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import Task, load_task
from distillery.training import trainers
from distillery.training.rows import TrainingRows
from distillery.training.student import build_student

FACTOR, PLANNED, UNCOUNTED = 10, 100, 2
STUDENT = {"model": "minilm-l6", "arch": "classifier", "init": {"layers": [0, 2, 5]}, "phases": []}
EPOCHS, BATCH = 3, 16


class StepClock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())


def corpus() -> list[str]:
    """All texts of the finance corpus in a random order that is always the same."""
    lines = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()
    order = np.random.default_rng(0).permutation(len(lines))
    return [json.loads(lines[i])["text"] for i in order]


def texts(n: int) -> list[str]:
    """The first `n` texts of the corpus, again and again when it has fewer."""
    every = corpus()
    return [every[i % len(every)] for i in range(n)]


def longest_texts() -> list[str]:
    """A batch of the longest texts of the corpus."""
    return sorted(corpus(), key=len)[-BATCH:]


def teach(n: int, name: str, folder: Path, task: Task) -> float:
    """Label `n` rows; the probabilities go to `folder`. Returns the seconds."""
    model_folder = fetch_model(name, load_params().models[name])
    arch = "causal" if name == "smollm2" else "classifier"
    model = load_model(model_folder, arch, labels=task.names, seed=0)
    teacher = LabelModel(model.eval(), load_tokenizer(model_folder), task, arch, prompt="plain")
    rows = texts(n)
    teacher.predict(longest_texts())  # also compares the methods, which is done once
    started = time.perf_counter()
    probabilities = teacher.predict(rows)
    seconds = time.perf_counter() - started
    np.save(folder / f"{n}.npy", probabilities)
    return seconds


def train(n: int, folder: Path, task: Task) -> float:
    """Train the student on the teacher's `n` rows; the seconds of all steps, by the mean of those that are counted."""
    spec = StudentConfig.model_validate(STUDENT)
    model_folder = fetch_model(spec.model, load_params().models[spec.model])
    probabilities = np.load(folder / f"{n}.npy")
    for name, rows in (("longest", longest_texts()), ("rows", texts(n))):
        student = build_student(spec, model_folder, task, 0)
        ends = train_on(student, rows, probabilities[: len(rows)], folder / f"{name}-{n}")
    seconds = np.diff(ends)[UNCOUNTED - 1 :]
    return float(seconds.mean() * len(ends))


def train_on(student: LabelModel, rows: list[str], probabilities: np.ndarray, folder: Path) -> list[float]:
    """Train `student` on texts and their `probabilities` [n, labels]. Returns when each step ended, in seconds."""
    table = TrainingRows(rows, probabilities.argmax(-1))
    table.logprobs = torch.from_numpy(probabilities).float().log().clamp(min=-30)
    table.teacher_weights = {"teacher": torch.ones(len(rows), dtype=torch.double)}
    phase = {"data": ["finance/train"], "teachers": ["teacher"], "loss": {"kl": 1.0}, "learning_rate": 1e-4}
    settings = PhaseConfig.model_validate(phase | {"epochs": EPOCHS, "batch_size": BATCH})
    clock = StepClock()
    options = {"folder": folder, "seed": 0, "title": "student", "checkpoint_every": 10**6, "teachers": {}}
    trainer = trainers.build_trainer(student, table, settings, **options)
    trainer.add_callback(clock)
    trainer.train()
    return clock.ends


def work(part: str, n: str, name: str, folder: str) -> None:
    """What a process of its own does; its last line has seconds and the largest memory in MB."""
    task = load_task("finance-sentiment")
    seconds = teach(int(n), name, Path(folder), task) if part == "teacher" else train(int(n), Path(folder), task)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    print(json.dumps({"seconds": seconds, "memory": memory}))


def measure(part: str, n: int, name: str, folder: str) -> dict[str, float]:
    """Seconds and memory of `part` on `n` rows, in a process of its own."""
    command = [sys.executable, __file__, "--work", part, str(n), name, folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(rows: int = 200, name: str = "smollm2") -> None:
    print(
        f"teacher {name}, student {STUDENT['model']} of three layers, threads of a process: {torch.get_num_threads()}"
    )
    print("\n            rows  seconds  by formula  difference     MB  difference", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for part in ("teacher", "student"):
            small, large = (measure(part, n, name, folder) for n in (rows, FACTOR * rows))
            formula = FACTOR * small["seconds"]
            print(f"{part:8}  {rows:6,}  {small['seconds']:7.1f}  {'':10}  {'':10}  {small['memory']:5.0f}")
            time_off, memory_off = large["seconds"] / formula - 1, large["memory"] / small["memory"] - 1
            print(
                f"{part:8}  {FACTOR * rows:6,}  {large['seconds']:7.1f}  {formula:10.1f}  {time_off:+10.1%}  "
                f"{large['memory']:5.0f}  {memory_off:+10.1%}"
            )
            planned = PLANNED * small["seconds"]
            print(f"{part:8}  {PLANNED * rows:6,}  planned  {planned:10.1f}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        main(*(kind(argument) for kind, argument in zip((int, str), sys.argv[1:], strict=False)))
