"""Stages, tests and processes of the project on the device."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stages
import tiny
from distillery.cli import strip
from distillery.config.load import load_params
from distillery.config.schema import ComputeConfig
from distillery.errors import UserError
from distillery.pipeline.inputs import write_student_inputs
from distillery.training.launch import run_processes
from gpu_checks import Place

BENCHMARKS = Path(__file__).parents[1]
PAPERMILL = {"student": "tiny-gold", "seed": 0}


def whole_experiment(place: Place) -> str:
    """Every notebook of `tests/smoke.yaml`, a student in 4 bits among them; the memory of the GPU is in its tables."""
    repo = tiny.copy_experiment(place.folder / "experiment", place.models)
    stages.execute_all(repo)
    with (repo / "reports/leaderboard.csv").open(encoding="utf-8") as file:
        models = list(csv.DictReader(file))
    peaks = {path.parent.name: json.loads(path.read_text()) for path in sorted((repo / "runs").glob("*/timing.json"))}
    on_gpu = {run: timing.get("peak_gpu_memory_mb") for run, timing in peaks.items()}
    measured = [row["model"] for row in models if row.get("gpu_memory_mb")]
    if place.is_gpu:
        assert all(on_gpu.values()), on_gpu
        assert measured, f"no model has gpu_memory_mb in the leaderboard, which has {', '.join(models[0])}"
    return f"{len(peaks)} students; peak GPU memory, MB: {on_gpu}; GPU memory of a prediction: {len(measured)} models"


def papermill_stage(place: Place) -> str:
    """04_distill as DVC runs it: a kernel of its own that papermill starts."""
    repo = tiny.copy_experiment(place.folder / "experiment", place.models)
    os.chdir(repo)
    strip()
    tiny.prepare_data(repo)
    params, name = load_params(), PAPERMILL["student"]
    write_student_inputs(repo, params.model_copy(update={"students": {name: params.students[name]}}))
    selectors = [word for key, value in PAPERMILL.items() for word in ("-p", key, str(value))]
    _run([sys.executable, "-m", "distillery", "run", "04_distill", *selectors], repo)
    timing = json.loads((repo / "runs/tiny-gold-0/timing.json").read_text())
    return ", ".join(f"{key} {value}" for key, value in timing.items())


def _run(command: list[str], folder: Path) -> None:
    """Run `command` in `folder`; raises RuntimeError with its last line."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "src"), *sys.path])}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    print(ended.stdout, ended.stderr, flush=True)
    if ended.returncode:
        raise RuntimeError((ended.stderr.strip().splitlines() or ["no message"])[-1])


class _Reports:
    """Counts the outcomes of tests, and keeps the failures."""

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] = self.outcomes.get(report.outcome, 0) + 1
        if report.failed:
            lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
            self.failures.append(f"{report.nodeid.partition('::')[2]}: {(lines or ['?'])[0][2:].strip()}")


def device_tests(place: Place) -> str:
    """`tests/test_devices.py` with the variable of the environment set to the device."""
    os.chdir(tiny.ROOT)
    reports = _Reports()
    arguments = ["tests/test_devices.py", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--basetemp"]
    pytest.main([*arguments, str(place.folder / "pytest")], plugins=[reports])
    figure = ", ".join(f"{count} {outcome}" for outcome, count in sorted(reports.outcomes.items()))
    assert not reports.failures, f"{figure}; {'; '.join(reports.failures)}"
    assert reports.outcomes.get("passed"), figure or "no test ran"
    return figure


def _run_together(place: Place, count: int) -> dict[str, Any]:
    """What `gpu_checks/together.py` writes in `count` processes under torchrun."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.chdir(tiny.ROOT)
    path = place.folder / "together.json"
    run_processes(
        ComputeConfig(processes=count), "gpu_checks.together", [place.device, str(place.models), str(path)], "gpu-check"
    )
    return json.loads(path.read_text())


def torchrun_process(place: Place) -> str:
    """A training under torchrun with one process: the backend starts, sums on the device, and changes no bit."""
    result = _run_together(place, 1)
    expected = {"cuda": "nccl", "cpu": "gloo"}[place.device]
    assert result["backend"] == expected, result
    assert result["same_bits"], result
    return f"{result['backend']}, world size {result['processes']}, {result['messages']} sums; the same bits as without"


def too_many_processes(place: Place) -> str:
    """A process without a GPU of its own ends the run in one line."""
    import torch

    gpus = torch.cuda.device_count()
    try:
        _run_together(place, gpus + 1)
    except UserError as mistake:
        return str(mistake)
    raise AssertionError(f"{gpus + 1} processes ran on {gpus} GPUs")
