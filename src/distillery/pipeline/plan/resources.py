"""Bytes and hours that a recipe takes, from shapes and numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from distillery.config.schema import ComputeConfig, StudentConfig, TeacherConfig, TrainingConfig
from distillery.models.layers import count_parameters, output_head
from distillery.training.sharding import unit_layers

# 4 bits, and a scale for each 64 weights of 8 bits and 32 / 256 more (Dettmers et al. 2023, section 3)
NF4_BYTES = (4 + 8 / 64 + 32 / (64 * 256)) / 8
FULL_BYTES, HALF_BYTES = 4, 2
GRADIENT_BYTES, ADAMW_BYTES, ADAMW_8BIT_BYTES = 4, 8, 2  # of a trained weight, in float32 but the last
UTILISATION = 0.3  # share of the peak that a training of this kind reaches; assumed


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet. memory: bytes. half, full: dense products a second in 16 bits and in float32."""

    memory: float
    half: float
    full: float

    def speed(self, dtype: str) -> float:
        """Products a second that a run in `dtype` is assumed to reach."""
        return UTILISATION * (self.full if dtype == "float32" else self.half)


GPU_ORIGIN = "the vendor's data sheets, written down from memory on 2026-11-26, not checked"
GPUS = {
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12),
    "h100-80gb": Gpu(80e9, 989e12, 67e12),
    "l4-24gb": Gpu(24e9, 121e12, 30.3e12),
}


@dataclass(frozen=True)
class Memory:
    """Bytes that a stage holds. activations: saved for the backward pass, in float32: with products in 16 bits less."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def certain(self) -> float:
        """All but the activations, which are an upper bound."""
        return self.total - self.activations


def merged_parameters(model: Any) -> int:
    """The number of weights of `model` when its adapters, if it has any, are merged."""
    total, trained = count_parameters(model)
    return total - trained if hasattr(model, "peft_config") else total


def dense_bytes(model: nn.Module, dtype: str) -> float:
    """Bytes of the merged weights of `model` in `dtype`."""
    return merged_parameters(model) * (FULL_BYTES if dtype == "float32" else HALF_BYTES)


def nf4_bytes(model: nn.Module) -> float:
    """Bytes of the merged weights of `model`, linear layers but the output head in 4 bits, others in 16."""
    head = output_head(model)
    linear = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not _is_adapter(module, model)
    }
    small = sum(linear.values())
    return NF4_BYTES * small + HALF_BYTES * (merged_parameters(model) - small)


def _is_adapter(module: nn.Module, model: Any) -> bool:
    return hasattr(model, "peft_config") and module.weight.requires_grad


def optimizer_bytes(phases: Sequence[TrainingConfig]) -> int:
    """Bytes of the optimizer's states for each trained weight, in the phase that has most."""
    return max((ADAMW_8BIT_BYTES if "8bit" in phase.optimizer else ADAMW_BYTES for phase in phases), default=0)


def training_memory(model: nn.Module, frozen: str, states: int, activations: float) -> Memory:
    """What training `model` holds. frozen: number format of the weights that are not trained, or `nf4`.

    states: bytes of the optimizer for each trained weight.
    """
    total, trained = count_parameters(model)
    if frozen == "nf4":
        weights = nf4_bytes(model) + FULL_BYTES * trained
    else:
        weights = FULL_BYTES * trained + (total - trained) * (FULL_BYTES if frozen == "float32" else HALF_BYTES)
    return Memory(weights, GRADIENT_BYTES * trained, states * trained, activations)


def memory_of_process(memory: Memory, model: nn.Module, compute: ComputeConfig, dtype: str) -> Memory:
    """What each process holds where those of `compute` train `model` together, which takes `memory` in one.

    Each has its share of the rows. With `strategy: fsdp` it also holds its shard of all weights, gradients and states,
    and gathered: the weights outside the layers and of two layers in `dtype`, and in float32 the gradients outside the
    layers and of one.
    """
    activations = memory.activations / compute.processes
    if compute.strategy == "ddp":
        return replace(memory, activations=activations)
    layers = [count_parameters(layer) for layer in unit_layers(model)] or [(0, 0)]
    (total, trained), largest = count_parameters(model), max(layers)
    outside, trained_outside = total - sum(n for n, _ in layers), trained - sum(n for _, n in layers)
    number_bytes = FULL_BYTES if dtype == "float32" else HALF_BYTES
    return Memory(
        memory.weights / compute.processes + number_bytes * (outside + 2 * largest[0]),
        memory.gradients / compute.processes + GRADIENT_BYTES * (trained_outside + largest[1]),
        memory.optimizer / compute.processes,
        activations,
    )


def frozen_format(spec: StudentConfig) -> str:
    """The number format of a student's frozen weights while it trains."""
    if spec.adapter.kind == "qlora":
        return "nf4"
    return spec.dtype if spec.adapter.kind in ("lora", "series") and spec.arch != "classifier" else "float32"


def prediction_bytes(model: nn.Module, spec: TeacherConfig) -> float:
    """Bytes of the weights of a teacher that predicts."""
    if spec.quantize == "nf4" and not spec.finetune:
        return nf4_bytes(model)
    return dense_bytes(model, "float32" if spec.kind == "classifier" else spec.dtype)


def size_text(size: float | None) -> str:
    """`size` bytes in GB."""
    return "unknown" if size is None else f"{size / 1e9:.2f}"
