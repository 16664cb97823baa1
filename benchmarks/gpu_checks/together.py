"""One of the processes that `compute.processes` starts: it sums gradients on the device, and trains as one process."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from distillery.models.devices import default_device
from distillery.training.worker import run_together
from gpu_checks import Place, use_device
from gpu_checks.students import CE_KL, phase_of, student_of, train, trained_weights


def sum_and_train(place: Place, result: Path) -> None:
    """Write to `result` what the processes did."""
    values = torch.arange(4.0, device=default_device())
    messages = 8
    for _ in range(messages):
        distributed.all_reduce(values)
    count = distributed.get_world_size()
    assert values.tolist() == [x * count**messages for x in range(4)], values
    weights = []
    for run in range(2):
        student = student_of(place, "classifier")
        train(replace(place, folder=result.parent / str(run)), student, phase_of(**CE_KL), "together")
        weights.append(trained_weights(student))
    facts = {"backend": distributed.get_backend(), "processes": count, "messages": messages}
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    result.write_text(json.dumps(facts | {"same_bits": same}))
    torch.save(weights[0], result.with_suffix(".pt"))


if __name__ == "__main__":
    use_device(sys.argv[1])
    place = Place(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]).parent)
    run_together(lambda: sum_and_train(place, Path(sys.argv[3])))
