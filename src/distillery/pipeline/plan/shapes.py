"""A step of training on shapes alone: the run's own loader, adapters and losses, without weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import masking_utils

from distillery.config.schema import ModelConfig, PhaseConfig, StudentConfig, TeacherConfig
from distillery.models.devices import shapes_alone
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_layers
from distillery.tasks.schema import Task
from distillery.training.completions import PhaseCompletions, StepCounts
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.phase_loss import PhaseLoss
from distillery.training.rows import phase_rows
from distillery.training.student import attach_adapters, build_student
from distillery.training.teacher_models import load_teacher_model
from distillery.training.teacher_signals import TeacherSignals

CHECKED_TOKENS = 64  # of an answer at most


@dataclass
class StepShapes:
    """What one micro-batch of a phase takes. flops: of forward and backward pass. activations: bytes that are saved for
    the backward pass, in float32. projections: (from, to) widths of the learned maps. signal_bytes: of a teacher's
    stored outputs for one row.
    """

    flops: int
    activations: int
    projections: list[tuple[int, int]] = field(default_factory=list)
    signal_bytes: int = 0


def open_student(spec: StudentConfig, origin: ModelConfig, folder: Path, task: Task) -> LabelModel:
    """The student before its first step, without weights. Raises UserError where the run would."""
    with shapes_alone():
        return build_student(spec, folder, task, 0, origin)


def open_teacher_shapes(name: str, spec: TeacherConfig, origin: ModelConfig, folder: Path, task: Task) -> LabelModel:
    """The teacher `name` before it is tuned, without weights. Raises UserError where the run would."""
    at_hand = ModelConfig(folder=str(folder.resolve()), labels=origin.labels)
    with shapes_alone():
        return load_teacher_model(name, spec, at_hand, task)


def adapt_teacher(teacher: LabelModel, spec: TeacherConfig) -> Any:
    """The model of `teacher` with the adapters of its fine-tuning, which it then has. Raises as the run would."""
    with shapes_alone():
        teacher.model = attach_adapters(teacher.model, spec.finetune.lora, teacher.arch, spec.seed)
    return teacher.model


def openable(
    name: str, spec: TeacherConfig, origin: ModelConfig, folder: Path, task: Task, cache: Path
) -> OpenableTeacher:
    """As :func:`distillery.training.openable_teachers.openable_teacher`, without weights."""
    return OpenableTeacher(
        lambda fold: open_teacher_shapes(name, spec, origin, folder, task), [name], count_layers(folder), cache
    )


@contextmanager
def masks_without_values() -> Iterator[None]:
    """transformers looks into a mask to see whether it can be left out, which a mask without values does not allow.

    It does not look while a graph is traced, and takes this for one.
    """
    with mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: True):
        yield


@masks_without_values()
def run_step(
    student: LabelModel, phase: PhaseConfig, frame: pd.DataFrame, teachers: dict[str, OpenableTeacher]
) -> StepShapes:
    """A micro-batch of `phase` on the rows of `frame`, forward and backward.

    Raises UserError where the run would: a teacher's vocabulary, layers or lengths of texts that do not fit.
    """
    scores = dict.fromkeys(phase.teachers, 1.0)
    rows = phase_rows(frame, phase, student.task.names, scores)
    completions = PhaseCompletions(student, rows, phase)
    signals = TeacherSignals(phase, rows, teachers, student, seed=0)
    loss_of_phase = PhaseLoss(phase, rows, completions, signals)
    sampled = [answers[0] for answers in completions.by_row] if phase.on_policy and completions.by_row else None
    batch = completions.micro_batch(list(range(len(rows))), sampled)
    student.model.train()
    ids = student.encode(rows.texts)
    student.forward_methods(ids, CHECKED_TOKENS)  # of a model with weights: compared before the count begins
    weights = [*student.model.parameters(), *student.model.buffers()]
    with FlopCounterMode(display=False) as counter:
        with saved_tensors(weights) as saved:
            outputs = student.forward(ids, batch.completions, **loss_of_phase.requested_outputs)
            loss, _ = loss_of_phase(outputs, batch, StepCounts.of([batch]))
        loss.backward()
    student.model.zero_grad(set_to_none=True)
    maps = [part for module in signals.projections.values() for part in module]
    stored = sum(path.stat().st_size for output in signals.outputs.values() for path in output.folder.glob("*.npy"))
    widths = sorted({(part.in_features, part.out_features) for part in maps})
    return StepShapes(counter.get_total_flops(), sum(saved.values()), widths, round(stored / max(1, len(rows))))


@contextmanager
def saved_tensors(weights: list[nn.Parameter | Tensor]) -> Iterator[dict[int, int]]:
    """The bytes of each storage that autograd saves within the context for the backward pass, without `weights`."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def without_checkpointing(spec: StudentConfig) -> StudentConfig:
    """`spec` whose activations are all kept."""
    return spec.model_copy(update={"gradient_checkpointing": False})


def with_checkpointing(stored: StepShapes, recomputed: StepShapes, layers: int) -> StepShapes:
    """The step whose layers are computed again: it holds their inputs, and all of one layer at a time."""
    one_layer = max(0, stored.activations - recomputed.activations) // layers
    return replace(recomputed, activations=recomputed.activations + one_layer)
