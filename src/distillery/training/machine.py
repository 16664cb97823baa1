"""The machine of a training, for its record."""

from __future__ import annotations

import os

import torch

from distillery.models.devices import cpu_model, default_device


def machine_name() -> str:
    """The processor with its cores and torch's threads, and the GPU where one is used."""
    processor = cpu_model().rpartition(" ")[0]  # without the hash of what it can do
    name = f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    device = default_device().type
    if device == "cpu":
        return name
    return f"{torch.cuda.get_device_name() if device == 'cuda' else device}; {name}"
