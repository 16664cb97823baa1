"""The disk that a training needs, and whether it is there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillery.errors import UserError
from distillery.models.label_model import LabelModel
from distillery.models.layers import count_parameters
from distillery.models.series_adapters import trained_alone

CHECKPOINTS = 3  # two are kept, and a third is written before the older one goes
ADAMW_STATES = 2  # running means of the gradient and of its square, one number for each trained weight


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of one checkpoint, and at most of all that a training writes until its model is saved."""

    checkpoint: int
    total: int


def disk_need(student: LabelModel, model: Any) -> DiskNeed:
    """What training `model`, as the trainer holds it, writes to the disk, by the sizes of its weights.

    The total counts `CHECKPOINTS`, the trained weights at the end, and the whole model in the precision of its file.
    """
    weights = list(model.parameters())
    trained = sum(weight.nbytes for weight in weights if weight.requires_grad)
    saved = trained if trained_alone(model) else sum(weight.nbytes for weight in weights)
    checkpoint = saved + ADAMW_STATES * trained
    half = student.arch == "causal" and student.dtype == torch.bfloat16
    whole = count_parameters(student.model)[0] * (2 if half else 4)
    return DiskNeed(checkpoint, CHECKPOINTS * checkpoint + saved + whole)


def check_disk(need: DiskNeed, folder: Path) -> None:
    """Raise UserError if the disk of `folder` has less free than `need`; what lies in `folder` already counts."""
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free + written < need.total:
        reason = f"the training needs up to {size_text(need.total)} of disk, and {size_text(free)} are free"
        raise UserError(f"{folder}: {reason}; free some space and run again")


def size_text(size: int) -> str:
    """`size` bytes in MB, from 1 GB on in GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
