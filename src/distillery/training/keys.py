"""Names of stored results: a result is used again only where computing it anew would give the same bits."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from typing import Any

import torch

from distillery.models.devices import default_device

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate")


def result_key(code: str, *parts: Any, threads: int | None = None) -> str:
    """A hash of `parts`, the `code` that computes the result, the libraries' versions, the number of threads, the GPU.

    code: see :func:`distillery.fingerprint.code_digest`. parts: bytes, or what JSON can hold. threads: those of torch,
    if it is None.
    """
    digest = hashlib.sha256(code.encode())
    versions = {name: version(name) for name in LIBRARIES}
    device = default_device().type
    threads = torch.get_num_threads() if threads is None else threads
    digest.update(json.dumps([versions, threads, *([] if device == "cpu" else [device])]).encode())
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]
