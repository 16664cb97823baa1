"""`strategy: fsdp`: two processes that hold a half of each weight equal one process, and continue what it has begun."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from distillery.models.save import save_model
from distillery.training import trainers
from distillery.training.processes import process_rank
from distillery.training.rows import phase_rows
from distillery.training.run import train_phase, validation_rows
from distillery.training.sharding import local_bytes, shard_model
from test_processes import CASES, LORA, STOPPED, Case, in_processes, rows_of
from test_training import LABELS, SHORT, WORDS, learner, openable_teachers, phase, toy

CASES = CASES | {
    "causal, all weights": Case("causal", {"ce": 1.0}, {"batch_size": 4, "accumulate": 2}),
}


def train_case(case: Case, models: Path, folder: Path, rows: int = 22, sharded: bool = True) -> dict[str, Any]:
    """As in tests/test_processes.py, with a model in shards where there are several processes."""
    student = learner(models, case.arch, case.task, scale=3, **case.student)
    if sharded:
        shard_model(student)
    archs = {"one": "causal"} if case.arch == "causal" else {"one": "classifier"}
    spec = phase(case.loss, **{"steps": 6} | case.settings)
    frame = toy(rows).assign(fold_one=-1, fold_two=-1)
    history = train_phase(
        student,
        phase_rows(frame, spec, LABELS),
        spec,
        folder=folder,
        seed=0,
        checkpoint_every=3,
        teachers=openable_teachers(models, folder.parent / "signals", **archs),
        validation=validation_rows(toy(9, 1), student.task) if spec.stopping else None,
    )
    return {"history": history}


def train_all(models: Path, folder: Path, sharded: bool) -> dict[str, dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "LOG_EVERY", 1)
        return {name: train_case(case, models, folder / name, rows_of(name), sharded) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def one(tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train_all(tiny_models, folder, False), folder


@pytest.fixture(scope="module")
def two(one, tiny_models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return in_processes(2, train_all, tiny_models, folder, True, folder=folder), folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    alone, (first, second) = one[0][name], [results[name] for results in two[0]]
    assert first["history"].equals(second["history"])
    pd.testing.assert_frame_equal(first["history"], alone["history"], rtol=1e-6, atol=0)
