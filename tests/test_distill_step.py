"""`benchmarks/distill_step.py`: both trainers supervise the same tokens."""

from __future__ import annotations

import numpy as np

import tiny
from distillery.models.load import load_model
from distillery.tasks.schema import load_task
from distillery.training.completions import row_completions
from distillery.training.rows import TrainingRows


def test_the_rows_of_the_benchmark_supervise_answer_and_reason_as_one_sequence(tiny_models):
    distill_step = tiny.load_benchmark("distill_step")
    folder, task = tiny_models / "tiny-llama", load_task("finance-sentiment", tiny.ROOT / "tasks")
    model = distill_step.Whole(load_model(folder, "causal"), distill_step.tokenizer_of(folder), task, "causal")
    expected = model.tokenizer(task.names[0] + distill_step.REASON + "profit rose")["input_ids"]
    # called by the name that a training calls, or an override under another one would go unseen
    rows = TrainingRows(["a text"], np.array([0]), rationales=["profit rose"])
    assert row_completions(model, rows) == [[([*expected, model.tokenizer.eos_token_id], 0)]]
