"""Sections of params.yaml with SmolLM2 that several benchmarks share."""

from __future__ import annotations

from typing import Any

HALF_STUDENT: dict[str, Any] = {  # half of it with adapters, for `students`
    "model": "smollm2",
    "arch": "causal",
    "prompt": "plain",
    "init": {"layers": "first-15"},
    "adapter": {"kind": "lora", "r": 16},
    "phases": [],
}
TUNED_TEACHER: dict[str, Any] = {  # tuned on the gold rows of the default experiment, for `teachers`
    "kind": "lm",
    "model": "smollm2",
    "prompt": "plain",
    "few_shot": 0,
    "dtype": "auto",
    "finetune": {
        "on": "finance/train",
        "epochs": 5,
        "batch_size": 8,
        "learning_rate": 6.0e-4,
        "lora": {"r": 16, "layers": "last-10"},
        "folds": 0,
    },
}
