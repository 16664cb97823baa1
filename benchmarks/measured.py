"""Seconds of training steps, and the memory that they hold: of the GPU where there is one, else of this process."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback

from distillery.models.devices import default_device, synchronize
from distillery.models.memory import gpu_peak, reset_gpu_peak


@dataclass
class Measured:
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    flops: float = 0.0
    tokens: float = 0.0
    cache: float = 0.0  # seconds a batch, once


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        synchronize(default_device())
        self.ends.append(time.perf_counter())


def reset_peak() -> None:
    gc.collect()
    if default_device().type != "cpu":
        reset_gpu_peak()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most memory held since :func:`reset_peak`, bytes; that of the GPU where there is one."""
    on_gpu = gpu_peak()
    if on_gpu is not None:
        return on_gpu
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
