"""`dtype: auto`: the number format in which this machine trains and predicts faster."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from math import inf
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from distillery.files import Paths, repository_root, write_json
from distillery.models.devices import cpu_model, default_device, synchronize, working_dtype
from distillery.models.layers import output_head
from distillery.models.packed.hidden import completion_hidden_states

Use = Literal["training", "prediction"]
USES: tuple[Use, ...] = ("training", "prediction")
DTYPES = ("float32", "bfloat16")  # float16 is slow on CPUs, and small gradients vanish in it
MIN_SPEEDUP = 1.1  # of bfloat16, below which float32 is taken: it has 16 more bits of precision
VARIABLE = "DISTILLERY_DTYPES"  # of the environment: what `auto` means, as JSON, in place of a choice by times
ROUNDS = 3
LAYERS, TOKENS = 4, 48  # of the timed model; tokens of a row
GPU_SCALE = 4  # of its width and of the rows: on a GPU the calls of a small model's operations hide its products


def resolve_dtype(dtype: str, use: Use) -> str:
    """`dtype` as it is, or the one that `auto` means for `use` on this machine.

    The first call on a machine times both number formats, which takes seconds. The choice stays in
    `.cache/dtype.json`, which no stage depends on: a later run decides the same, and nothing reruns. float32 where
    the device has no products in `dtype`. On the `meta` device, which stands for a GPU, `auto` is bfloat16. Processes
    that train together take the choice of the one that started them, from :data:`VARIABLE`.
    """
    if dtype == "auto":
        if default_device().type == "meta":
            return "bfloat16"
        if chosen := os.environ.get(VARIABLE):
            return json.loads(chosen)[use]
        return faster_dtypes(Paths(repository_root()).cache / "dtype.json")[use]
    return working_dtype(dtype)


def resolve_dtypes(dtype: str) -> dict[Use, str]:
    """:func:`resolve_dtype` for training and for prediction."""
    return {use: resolve_dtype(dtype, use) for use in USES}


def describe_dtypes(dtype: str, uses: Sequence[Use] = USES) -> str:
    """A sentence on the number formats that `dtype` means for `uses` on this machine."""
    formats = " and ".join(f"{use} in {resolve_dtype(dtype, use)}" for use in uses)
    reason = "; `dtype: auto` takes what is faster on this machine" if dtype == "auto" else ""
    return f"Products: {formats}{reason}."


def faster_dtypes(path: Path) -> dict[Use, str]:
    """For training and prediction the faster number format on this machine, from the file `path` if it is there."""
    records = json.loads(path.read_text()) if path.exists() else {}
    machine = json.dumps([cpu_model(), torch.get_num_threads(), default_device().type, version("torch")])
    if machine not in records:
        seconds = time_dtypes()
        records[machine] = {"dtypes": {use: choose_dtype(times) for use, times in seconds.items()}, "seconds": seconds}
        write_json(path, records)
    return records[machine]["dtypes"]


def choose_dtype(seconds: dict[str, float]) -> str:
    """bfloat16 if it is at least :data:`MIN_SPEEDUP` times as fast as float32, else float32."""
    return "bfloat16" if seconds["float32"] >= MIN_SPEEDUP * seconds.get("bfloat16", inf) else "float32"


def time_dtypes() -> dict[Use, dict[str, float]]:
    """Seconds of a training step (8 rows, adapters) and of a prediction (32 rows) in those of :data:`DTYPES` that work.

    A small language model of SmolLM2's width does what a run does with a large one; a bare matrix product would
    mislead, since half of a step are other operations. On a GPU the model is :data:`GPU_SCALE` times as wide, and has
    as many times the rows. The formats take turns; each one's fastest round counts.
    The state of the random generator stays as it was.
    """
    dtypes = list(dict.fromkeys(map(working_dtype, DTYPES)))
    with torch.random.fork_rng():
        models = {dtype: _build_model(dtype) for dtype in dtypes}
    uses: dict[Use, Callable[[nn.Module, str], None]] = {"training": _train, "prediction": _predict}
    seconds = {use: dict.fromkeys(dtypes, inf) for use in uses}
    for use, run in uses.items():
        for round_number in range(ROUNDS + 1):
            for dtype, model in models.items():
                start = time.perf_counter()
                run(model, dtype)
                if round_number:  # the first round compiles kernels
                    seconds[use][dtype] = min(seconds[use][dtype], time.perf_counter() - start)
    return seconds


def _build_model(dtype: str) -> nn.Module:
    """A random language model with layers like SmolLM2's and adapters, its frozen weights in `dtype`."""
    torch.manual_seed(0)
    scale = _scale()
    config = LlamaConfig(
        hidden_size=576 * scale,
        intermediate_size=1536 * scale,
        num_hidden_layers=LAYERS,
        num_attention_heads=9 * scale,
        num_key_value_heads=3 * scale,
        vocab_size=8192,
    )
    model = LlamaForCausalLM(config).to(default_device(), getattr(torch, dtype))
    return get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


def _scale() -> int:
    return 1 if default_device().type == "cpu" else GPU_SCALE


def _score(model: nn.Module, dtype: str, rows: int) -> torch.Tensor:
    """Logits at the answers of `rows` rows, as a run computes them."""
    prompts = [[row, *range(rows, rows + TOKENS)] for row in range(rows)]
    with torch.autocast(default_device().type, getattr(torch, dtype), enabled=dtype != "float32"):
        states = completion_hidden_states(model, prompts, [[[1, 2]]] * rows)
        return output_head(model)(states.hidden).float()


def _train(model: nn.Module, dtype: str) -> None:
    _score(model, dtype, 8 * _scale()).logsumexp(-1).sum().backward()
    model.zero_grad()
    synchronize(default_device())


@torch.no_grad()
def _predict(model: nn.Module, dtype: str) -> None:
    _score(model, dtype, 32 * _scale())
    synchronize(default_device())
