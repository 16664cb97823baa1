"""What the checkpoints of a phase hold beside the trainer's own: projections, and a model in shards as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from distillery.models.series_adapters import has_series_adapters, trained_alone, trained_weights
from distillery.training.processes import process_count
from distillery.training.sharding import (
    load_optimizer_state,
    shard_weights,
    whole_optimizer_state,
    whole_tensor,
    whole_weights_by_name,
)
from distillery.training.weights import load_weights

PROJECTIONS = "projections.safetensors"


class CheckpointsMixin:
    """A trainer's checkpoints, which one process and several, with or without shards, write and read alike."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        projections = self.model.projections.state_dict() if self.signals.projections else {}
        if self.student.sharded is not None:  # all processes gather; the first one writes
            state_dict = whole_weights_by_name(self.model, trained_alone(self.model))
            projections = {name: whole_tensor(weight) for name, weight in projections.items()}
        elif has_series_adapters(self.model):
            state_dict = trained_weights(self.model)
        super()._save(output_dir, state_dict)
        if projections and self.args.should_save:  # of a model with adapters, these alone are saved
            save_file(projections, Path(output_dir) / PROJECTIONS)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        sharded = self.student.sharded is not None
        if sharded:
            (file,) = Path(checkpoint).glob("*model*.safetensors")
            load_weights(self.model, file)
        else:
            super()._load_from_checkpoint(checkpoint, model)
        if self.signals.projections:
            weights, projections = load_file(Path(checkpoint) / PROJECTIONS), self.model.projections
            projections.load_state_dict(shard_weights(projections, weights) if sharded else weights)

    def _load_best_model(self) -> None:
        if self.student.sharded is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.student.sharded is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.student.sharded is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_optimizer_state(self.optimizer, state)
        self.lr_scheduler.load_state_dict(schedule)

    def _save_rng_state(self, output_dir: str) -> None:
        if process_count() == 1:  # else the random state is a function of the step
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if process_count() == 1:
            super()._load_rng_state(checkpoint)
