"""Several processes that train together: they equal one, decide alike, and continue after one of them was killed."""

from __future__ import annotations

import gc
import os
import pickle
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import tiny
from distillery.config.schema import ComputeConfig
from distillery.errors import UserError
from distillery.models.forward_check import KEEP_CHECKS
from distillery.pipeline.environment import ENVIRONMENT
from distillery.training import trainers
from distillery.training.launch import run_processes
from distillery.training.processes import join_processes, process_count, process_rank
from distillery.training.rows import phase_rows
from distillery.training.run import train_phase, validation_rows
from distillery.training.shared_steps import share_rows
from distillery.training.worker import run_together
from forked import fork_context
from test_training import LABELS, SHORT, WORDS, learner, openable_teachers, phase, toy

LORA = {"adapter": {"kind": "lora", "r": 4}}
STOPPED = {"early_stopping": {"every": 1, "patience": 2, "metric": "accuracy"}, "steps": 12}


@dataclass(frozen=True)
class Case:
    """A training: of which student, on what loss, with what settings of its phase."""

    arch: str
    loss: dict[str, float]
    settings: dict[str, Any]
    student: dict[str, Any] = field(default_factory=dict)
    task: Any = WORDS


# 22 rows in steps of 8: the third step of an epoch has 6, and is uneven however it is cut
CASES = {
    "classifier": Case("classifier", {"ce": 0.5, "kl": 0.5}, {"batch_size": 4, "accumulate": 2, "temperature": 2.0}),
    "causal": Case("causal", {"jsd": 1.0}, {"batch_size": 4, "accumulate": 2, "space": "vocabulary"}, LORA, SHORT),
    "one row a micro-batch": Case("causal", {"ce": 1.0}, {"batch_size": 1, "accumulate": 3}, LORA),
    "more processes than rows": Case("classifier", {"ce": 1.0}, {"batch_size": 3}),
    "hidden states": Case("classifier", {"ce": 0.5, "pkd": 0.5}, {"batch_size": 6, "layers": "skip"}, task=SHORT),
    "early stopping": Case("classifier", {"ce": 1.0}, {"batch_size": 8} | STOPPED),
}


KILLED = Case("classifier", {"ce": 1.0}, {"batch_size": 4, "steps": 15}, {"dropout": True})


def train_case(case: Case, models: Path, folder: Path, rows: int = 22, **more: Any) -> dict[str, Any]:
    """Train the student of `case`; its history, its predictions, and the step at which it ended."""
    student = learner(models, case.arch, case.task, scale=3, **case.student)
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
        **more,
    )
    weights = {name: p.detach().clone() for name, p in student.model.named_parameters() if p.requires_grad}
    return {"history": history, "predictions": student.predict(frame["text"].tolist()), "weights": weights}


def rows_of(name: str) -> int:
    return 7 if name == "more processes than rows" else 22  # steps of 3, 3 and 1 rows


def train_all(models: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """All of `CASES`; each step is logged."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainers, "LOG_EVERY", 1)
        return {name: train_case(case, models, folder / name, rows_of(name)) for name, case in CASES.items()}


def in_processes(count: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `function` returns in each of `count` processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        fork_context().Process(target=take_part, args=(rank, count, port, folder, function, arguments))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def take_part(rank: int, count: int, port: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    """Runs in a process of its own: see :func:`in_processes`."""
    gc.freeze()  # see tests/conftest.py
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in here.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with join_processes():
        assert (process_rank(), process_count()) == (rank, count)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*arguments)))


def continue_from(checkpoint: Path, models: Path, folder: Path) -> dict[str, Any]:
    """Go on with the training of the case `causal` from `checkpoint`."""
    if process_rank() == 0:
        shutil.copytree(checkpoint, folder / checkpoint.name)
    return train_case(CASES["causal"], models, folder)


def shared_work(models: Path, folder: Path, alone: Path) -> dict[str, dict[str, Any]]:
    """What the two processes of this file do."""
    results = train_all(models, folder)
    results["unbroken"] = train_case(KILLED, models, folder / "unbroken")
    results["continued"] = continue_from(alone / "causal/checkpoint-3", models, folder / "continued")
    return results


@pytest.fixture(scope="module")
def one(tiny_models, tmp_path_factory) -> tuple[dict[str, dict[str, Any]], Path]:
    """The results of one process, and its folder."""
    folder = tmp_path_factory.mktemp("one")
    return train_all(tiny_models, folder), folder


@pytest.fixture(scope="module")
def two(one, tiny_models, tmp_path_factory) -> tuple[list[dict[str, dict[str, Any]]], Path]:
    """The results of each of two processes, and their folder."""
    folder = tmp_path_factory.mktemp("two")
    return in_processes(2, shared_work, tiny_models, folder, one[1], folder=folder), folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(one, two, name):
    """The loss and its terms to 1e-6 at each step, and the label of each row."""
    alone, (first, second) = one[0][name], [results[name] for results in two[0]]
    assert first["history"].equals(second["history"])
    assert all(torch.equal(weight, second["weights"][key]) for key, weight in first["weights"].items())
    pd.testing.assert_frame_equal(first["history"], alone["history"], rtol=1e-6, atol=0)
    assert first["history"]["loss"].nunique() == len(first["history"])
    assert (len(first["history"]) < CASES[name].settings.get("steps", 6)) == (name == "early stopping")
    np.testing.assert_allclose(first["predictions"], alone["predictions"], atol=1e-5)
    assert (first["predictions"].argmax(-1) == alone["predictions"].argmax(-1)).all()


def test_a_run_continues_on_another_number_of_processes(one, two, tiny_models, tmp_path):
    """From a checkpoint of one process in two, and from one of two processes in one: as if nothing had happened."""
    back = continue_from(two[1] / "causal/checkpoint-3", tiny_models, tmp_path / "run")
    for continued in (two[0][0]["continued"], back):
        np.testing.assert_allclose(continued["predictions"], one[0]["causal"]["predictions"], atol=1e-6)


def test_only_the_first_process_writes_checkpoints(two):
    files = {path.name for path in (two[1] / "causal/checkpoint-6").iterdir()}
    assert "trainer_state.json" in files and not [name for name in files if name.startswith("rng_state")]


@pytest.mark.parametrize(("count", "batch_size"), [(1, 4), (2, 4), (3, 2), (4, 1), (5, 8)])
def test_the_shares_of_a_step_are_its_rows(count, batch_size):
    lengths = np.random.default_rng(0).integers(1, 50, 40).tolist()
    micro_batches = [list(range(k * batch_size, (k + 1) * batch_size)) for k in range(4)]
    micro_batches[-1] = micro_batches[-1][: max(1, batch_size // 2)]
    sampled = [False, True, True, False]
    shares = [
        share_rows(micro_batches, sampled, lengths, batch_size=batch_size, rank=rank, count=count)
        for rank in range(count)
    ]
    for kind in (True, False):
        rows = [i for batch, own in zip(micro_batches, sampled, strict=True) if own == kind for i in batch]
        assert sorted(i for share in shares for own, of in share if of == kind for i in own) == sorted(rows)
    for share in shares:
        assert len(share) == len(micro_batches) and max(len(rows) for rows, _ in share) <= batch_size
    sizes = [sum(len(rows) for rows, _ in share) for share in shares]
    assert max(sizes) - min(sizes) <= 2  # one row of each kind


def kill_at_a_checkpoint(folder: Path) -> None:
    """SIGKILL the second process as soon as a whole checkpoint is there."""
    end = time.monotonic() + 120
    while not (folder / "run/checkpoint-3/trainer_state.json").exists():
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)


def test_a_killed_process_is_named_and_the_run_continues(two, tiny_models, tmp_path, monkeypatch, capsys):
    """As if nothing had happened: to the bit, with dropout."""
    folder = tmp_path / "killed"
    folder.mkdir()
    for name, value in ENVIRONMENT.items():
        if name != KEEP_CHECKS:
            monkeypatch.setenv(name, os.environ.get(name, value))
    monkeypatch.setenv("DISTILLERY_DTYPES", '{"training": "float32", "prediction": "float32"}')
    monkeypatch.setenv("PYTHONPATH", str(tiny.ROOT / "tests"))
    watch = threading.Thread(target=kill_at_a_checkpoint, args=(folder,))
    watch.start()
    with pytest.raises(UserError) as error:
        run_processes(ComputeConfig(processes=2), "test_processes", [str(tiny_models), str(folder)], "tiny")
    watch.join()
    assert str(error.value) == (
        "tiny: process 1 of 2, counted from 0, was ended by SIGKILL (out of memory?); run again: it continues from the "
        "last checkpoint"
    )
    shown = capsys.readouterr().out
    assert len(re.findall(r"training: a checkpoint takes", shown)) == 1, shown  # the first process alone prints
    first, _ = in_processes(2, train_case, KILLED, tiny_models, folder / "run", folder=tmp_path / "again")
    assert {path.name for path in (folder / "run").iterdir()} == {"checkpoint-12", "checkpoint-15"}
    for name, weight in two[0][0]["unbroken"]["weights"].items():
        assert torch.equal(first["weights"][name], weight), name


def run_by_the_launcher(models: str, folder: str) -> None:
    """Runs in each process that torchrun starts."""
    (Path(folder) / f"pid-{process_rank()}").write_text(str(os.getpid()))
    train_case(KILLED, Path(models), Path(folder) / "run")


if __name__ == "__main__":
    run_together(lambda: run_by_the_launcher(*sys.argv[1:]))
