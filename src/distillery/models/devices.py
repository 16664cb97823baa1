"""The device on which models run: one CUDA GPU, Apple's GPU (MPS), or the CPU."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillery.errors import UserError

VARIABLE = "DISTILLERY_DEVICE"  # of the environment: one of DEVICES, instead of the first that works
DEVICES = ("cuda", "mps", "cpu")
NO_FLOAT64 = ("mps",)
NO_4_BIT = ("mps",)  # bitsandbytes has no kernels there
NO_DETERMINISM = ("mps",)  # operations without a deterministic algorithm warn there, and raise on the others
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch wants it for deterministic matrix products

_loaded_on_cpu: ContextVar[bool] = ContextVar("loaded_on_cpu", default=False)
_chosen: ContextVar[torch.device | None] = ContextVar("chosen", default=None)  # by shapes_alone


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Models that are loaded in this context are on torch's `meta` device: they have shapes, and no weights."""
    token = _chosen.set(torch.device("meta"))
    try:
        yield
    finally:
        _chosen.reset(token)


@contextmanager
def load_on_cpu() -> Iterator[None]:
    """Models that are loaded in this context are on the CPU, whatever the device is on which they will run."""
    token = _loaded_on_cpu.set(True)
    try:
        yield
    finally:
        _loaded_on_cpu.reset(token)


def default_device() -> torch.device:
    """The device of all models: the one that :data:`VARIABLE` names, else the first of :data:`DEVICES` that works.

    Raises UserError when the variable names no device, or one that does not work here.
    """
    if chosen := _chosen.get():
        return chosen
    named = os.environ.get(VARIABLE)
    if not named:
        return torch.device(next(device for device in DEVICES if _is_usable(device)))
    if named not in DEVICES:
        raise UserError(f"{VARIABLE}={named}: no such device; there are: {', '.join(DEVICES)}")
    if not _is_usable(named):
        usable = ", ".join(device for device in DEVICES if _is_usable(device))
        raise UserError(f"{VARIABLE}={named}: torch {torch.__version__} cannot use it here; it can use: {usable}")
    return torch.device(named)


def weight_device(quantize: bool) -> torch.device:
    """Where the weights of a model go; a model in 4 bits goes to the CPU where its GPU has no such kernels."""
    device = default_device()
    if quantize and device.type in NO_4_BIT:
        _print_once(f"{device.type}: no kernels for weights in 4 bits; such a model runs on the CPU")
        return torch.device("cpu")
    return torch.device("cpu") if _loaded_on_cpu.get() else device


def working_dtype(dtype: str) -> str:
    """`dtype`, or float32 where products in it do not work on :func:`default_device`.

    bfloat16 needs macOS 14 on Apple's GPU. float16 does not take its place: its range is smaller.
    """
    device = default_device().type
    return dtype if device == "meta" or _multiplies(device, getattr(torch, dtype)) else "float32"


def move_tensor(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, in float32 where it is float64 and the device has no such numbers."""
    if tensor.dtype == torch.float64 and device.type in NO_FLOAT64:
        tensor = tensor.float()
    return tensor.to(device)


def to_array(tensor: Tensor) -> np.ndarray:
    """The values of `tensor`; zeros for one on the `meta` device, which has none."""
    return np.zeros(tuple(tensor.shape), np.float32) if tensor.is_meta else tensor.cpu().numpy()


def cpu_model() -> str:
    """The name of the processor and a hash of what it can do, which a virtual machine may restrict."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    name, flags = (
        next((x for x in lines if x.startswith(key)), "").partition(":")[2] for key in ("model name", "flags")
    )
    return f"{name.strip() or platform.processor()} {hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def synchronize(device: torch.device) -> None:
    """Wait until the work on `device` is done."""
    if device.type in ("cuda", "mps"):
        torch.get_device_module(device).synchronize()


def _is_usable(device: str) -> bool:
    if device == "cpu":
        return True
    available = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    return available and _multiplies(device, torch.float32)


@cache
def _multiplies(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of two matrices in `dtype` works on `device`; a line is printed where it does not."""
    os.environ.setdefault(*CUBLAS_WORKSPACE)
    try:
        matrix = torch.ones(2, 2, dtype=dtype, device=device)
        return (matrix @ matrix).sum().item() == 8
    except (RuntimeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{device}: products in {str(dtype).removeprefix('torch.')} do not work here: {reason}", flush=True)
        return False


@cache
def _print_once(line: str) -> None:
    print(line, flush=True)
