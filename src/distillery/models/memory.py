"""The memory that this process, and its GPU, have held at most, and what it can give back."""

from __future__ import annotations

import ctypes
import resource
import sys
from contextlib import suppress

import torch

from distillery.models.devices import default_device


def process_peak() -> int:
    """Bytes of main memory that this process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kilobytes


def release_free_memory() -> None:
    """Give main memory that is free within this process back to the system; only with glibc, that of most Linuxes.

    Batches of many lengths leave gaps between what stays, which glibc keeps: a long training would hold ever more.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library has no such function, Windows no such name
        ctypes.CDLL(None).malloc_trim(0)


def gpu_peak() -> int | None:
    """Bytes of GPU memory that this process has held at most since :func:`reset_gpu_peak`; None without a GPU.

    Apple's GPU reports no peak: there it is what its driver holds now, which keeps freed memory for later use.
    """
    device = default_device().type
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return torch.mps.driver_allocated_memory() if device == "mps" else None


def reset_gpu_peak() -> int:
    """Let :func:`gpu_peak` count from here on. Returns the bytes of GPU memory that are held now; 0 without a GPU."""
    device = default_device().type
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.mps.driver_allocated_memory() if device == "mps" else 0


def peak_record() -> dict[str, int]:
    """Peaks in MB (2^20 bytes) for `timing.json`: peak_memory_mb, and on a GPU peak_gpu_memory_mb."""
    on_gpu = gpu_peak()
    record = {"peak_memory_mb": round(process_peak() / 2**20)}
    return record if on_gpu is None else record | {"peak_gpu_memory_mb": round(on_gpu / 2**20)}
