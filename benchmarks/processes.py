"""A training step on two processes of one thread, against one process of one thread.

    PYTHONPATH=src OMP_NUM_THREADS=1 python benchmarks/processes.py [rounds, 2 by default] [classifier] [causal]

The same global batch and seed, in float32 and in bfloat16: a classifier (MiniLM's layers 0, 2 and 5, cross-entropy and
KL over the labels, batch of 32) and a causal student (SmolLM2's first 15 layers, LoRA r 16 on all linear layers, JSD
over the vocabulary, batch of 8), on rows of the finance corpus. Dropout is off, since it differs by process. The two
take turns; each is started by the launcher of `compute.processes`, and its first two steps are not counted. The
teacher's outputs are computed before.

Prints seconds a step (the median), the ratio, the largest memory of a process, the largest relative difference of the
loss of a step, and of how many of 606 other rows the trained students predict the same label. It needs two idle cores.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from smollm2 import HALF_STUDENT
from transformers import TrainerCallback

from distillery.config.load import load_params
from distillery.config.schema import ComputeConfig, PhaseConfig, StudentConfig
from distillery.files import repository_root
from distillery.models.fetch import fetch_model
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.tasks.schema import Task, load_task
from distillery.training import trainers
from distillery.training.launch import run_processes
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.processes import gather, process_count, process_rank
from distillery.training.rows import TrainingRows
from distillery.training.sharding import build_for_training, local_bytes
from distillery.training.student import build_student
from distillery.training.worker import run_together

COUNTS, UNCOUNTED = (1, 2), 2
STUDENTS: dict[str, dict[str, Any]] = {
    "classifier": {"model": "minilm-l6", "arch": "classifier", "init": {"layers": [0, 2, 5]}, "phases": []},
    "causal": HALF_STUDENT,
    "whole": HALF_STUDENT | {"init": {"layers": "first-6"}, "adapter": {"kind": "none"}},
}
TIMED = ("classifier", "causal")  # here; benchmarks/shards.py measures the memory of all
PHASES: dict[str, dict[str, Any]] = {
    "classifier": {"loss": {"ce": 0.5, "kl": 0.5}, "temperature": 2.0, "batch_size": 32, "steps": 30},
    "causal": {"loss": {"jsd": 1.0}, "space": "vocabulary", "batch_size": 8, "steps": 12},
    "whole": {"loss": {"jsd": 1.0}, "space": "vocabulary", "batch_size": 8, "steps": 4},
}
ROWS = {"classifier": 640, "causal": 48, "whole": 16}
PREDICTED = 606  # the last rows of the corpus, which no student is trained on


class StepClock(TrainerCallback):
    """When each step ended, and what this process held before it of weights, gradients and optimizer states."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        states = [x for entry in optimizer.state.values() for x in entry.values() if x.dim()]
        gradients = [weight.grad for weight in model.parameters()]
        self.held = [local_bytes(tensors) for tensors in (model.parameters(), gradients, states)]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())


def corpus() -> list[dict[str, Any]]:
    """The rows of the finance corpus."""
    lines = (repository_root() / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def rows_of(task: Task, n: int) -> TrainingRows:
    """The first `n` rows of the corpus, with drawn distributions of a teacher."""
    examples = corpus()[:n]
    rows = TrainingRows(
        [row["text"] for row in examples], np.array([task.names.index(row["label"]) for row in examples])
    )
    rows.logprobs = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(len(task.names)), n)).log().float()
    rows.teacher_weights = {"teacher": torch.ones(n, dtype=torch.double)}
    return rows


def train(kind: str, dtype: str, folder: str, strategy: str, predicted: str) -> None:
    """Runs in each process: train the student `kind`, and write its times, losses and memory to `folder`.

    predicted: the number of rows whose labels the first process then predicts, without shards.
    """
    params, task = load_params(), load_task("finance-sentiment")
    spec = StudentConfig.model_validate(STUDENTS[kind] | {"dtype": dtype})
    model_folder = fetch_model(spec.model, params.models[spec.model])
    compute = ComputeConfig.model_construct(processes=process_count(), strategy=strategy)
    student = build_for_training(compute, lambda: build_student(spec, model_folder, task, 0))
    for module in student.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def open_teacher(fold: int) -> LabelModel:
        model = load_model(model_folder, spec.arch, labels=task.names, seed=1)
        return LabelModel(model, load_tokenizer(model_folder), task, spec.arch, prompt=spec.prompt)

    phase = {"data": ["finance/train"], "teachers": ["teacher"], "learning_rate": 1e-4, **PHASES[kind]}
    trainers.LOG_EVERY, clock = 1, StepClock()
    trainer = trainers.build_trainer(
        student,
        rows_of(task, ROWS[kind]),
        PhaseConfig.model_validate(phase),
        folder=Path(folder) / "run",
        seed=0,
        title=kind,
        checkpoint_every=10**6,
        teachers={"teacher": OpenableTeacher(open_teacher, [kind], 0, Path(folder).parent / "signals")},
    )
    trainer.add_callback(clock)
    trainer.train()
    memory = gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024))
    if process_rank() == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seconds = np.diff(clock.ends)[UNCOUNTED - 1 :].tolist()
        result = {"s": seconds, "loss": losses, "memory": max(memory), "held": clock.held}
        if n := int(predicted):
            result["labels"] = student.predict([row["text"] for row in corpus()[-n:]]).argmax(-1).tolist()
        (Path(folder) / "result.json").write_text(json.dumps(result))


def measure(
    kind: str, dtype: str, count: int, folder: Path, strategy: str = "ddp", predicted: int = 0
) -> dict[str, Any]:
    """The results of :func:`train` on `count` processes, by a `strategy` of `compute`."""
    folder.mkdir(parents=True)
    arguments = [kind, dtype, str(folder), strategy, str(predicted)]
    run_processes(ComputeConfig(processes=count), "processes", arguments, kind)
    return json.loads((folder / "result.json").read_text())


def main() -> None:
    """Measure the students, all by default, `rounds` times, and print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    table = []
    for kind in sys.argv[2:] or TIMED:
        for dtype in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as scratch:
                results = {
                    (turn, count): measure(
                        kind, dtype, count, Path(scratch) / f"{turn}-{count}", predicted=0 if turn else PREDICTED
                    )
                    for turn in range(-1, rounds)  # the first turn computes what is kept
                    for count in COUNTS
                    if turn >= 0 or count == 1
                }
            one, two = (median(s for turn in range(rounds) for s in results[turn, count]["s"]) for count in COUNTS)
            losses, labels = ([np.array(results[0, count][key]) for count in COUNTS] for key in ("loss", "labels"))
            table.append(
                {
                    "student": kind,
                    "products": dtype,
                    "one, s a step": f"{one:.3f}",
                    "two, s a step": f"{two:.3f}",
                    "ratio": f"{one / two:.2f}",
                    "MB, one": f"{results[0, 1]['memory']:.0f}",
                    "MB, each of two": f"{results[0, 2]['memory']:.0f}",
                    "loss, relative": f"{np.abs(losses[1] / losses[0] - 1).max():.1e}",
                    "same label": f"{(labels[0] == labels[1]).sum()} of {len(labels[0])}",
                }
            )
    print(f"threads of a process: {torch.get_num_threads()}")
    print(pd.DataFrame(table).to_string(index=False))
    print("ratio:", min(float(row["ratio"]) for row in table))


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        run_together(lambda: train(*sys.argv[1:]))
    else:
        main()
