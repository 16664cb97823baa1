"""The student of several benchmarks: half of SmolLM2 with adapters, as a section of `students` in params.yaml."""

from __future__ import annotations

from typing import Any

HALF_STUDENT: dict[str, Any] = {
    "model": "smollm2",
    "arch": "causal",
    "prompt": "plain",
    "init": {"layers": "first-15"},
    "adapter": {"kind": "lora", "r": 16},
    "phases": [],
}
