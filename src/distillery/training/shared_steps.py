"""Optimizer steps whose rows several processes share: the steps of one process, but for rounding and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import Trainer

from distillery.config.schema.compute import FSDP_OPTIMIZER, ONE_PROCESS_TERM
from distillery.errors import UserError
from distillery.training.completions import StepCounts
from distillery.training.processes import process_count, process_rank, share_weights, sum_gradients, sum_numbers
from distillery.training.sharding import choose_methods, clip_gradients, is_sharded, shard_new_weights


def share_rows(
    micro_batches: Sequence[Sequence[int]],
    sampled: Sequence[bool],
    lengths: Sequence[int],
    *,
    batch_size: int,
    rank: int,
    count: int,
) -> list[tuple[list[int], bool]]:
    """The share of process `rank` of `count` in an optimizer step that consists of the rows `micro_batches`.

    sampled: for each micro-batch, whether the student answers its rows itself; these rows stay together. lengths: of
    each row, in tokens: all processes get as many rows of each length, but for one.
    Returns as many pairs (rows, sampled) as there are micro-batches: of at most `batch_size` rows, the last ones empty.
    """
    shares = []
    for kind in dict.fromkeys(sampled):
        rows = [i for batch, own in zip(micro_batches, sampled, strict=True) if own == kind for i in batch]
        rows = sorted(rows, key=lengths.__getitem__)[rank::count]
        shares += [(rows[start : start + batch_size], kind) for start in range(0, len(rows), batch_size)]
    return shares + [([], False)] * (len(micro_batches) - len(shares))


class SharedStepsMixin:
    """What a trainer does otherwise where several processes train together; one process alone is left as it is.

    Every process goes through all batches and takes its share of each optimizer step. It holds the whole model and sums
    its gradients with those of the others once a step, before they are clipped; or it holds shards, see
    :mod:`distillery.training.sharding`. So no wrapper stands around the model, whose layers the loss calls in ways of
    its own.
    """

    def share_model(self) -> None:
        """Let all processes begin with the same weights, and leave the model without a wrapper.

        Raises UserError for a term of the loss that does not add up over the processes.
        """
        if process_count() > 1:
            if "label_prior" in self.phase.loss:
                raise UserError(ONE_PROCESS_TERM)
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
            if self.student.sharded is None:
                share_weights(weight for weight in self.model.parameters() if weight.requires_grad)
                return
            if self.phase.optimizer != "adamw":
                raise UserError(f"optimizer: {self.phase.optimizer}: {FSDP_OPTIMIZER}")
            self.accelerator.clip_grad_norm_ = clip_gradients
            shard_new_weights(self.student)
            completions = [tokens for row in self.completions.off_policy or [] for tokens, _ in row]
            longest = max([self.phase.max_new_tokens if self.phase.on_policy else 0, *map(len, completions)])
            choose_methods(self.student, self.token_ids, longest)

    def share_step(self, micro_batches: list[list[int]], sampled: list[bool]) -> list[tuple[list[int], bool]]:
        """This process's share of an optimizer step, see :func:`share_rows`; all of it in one process alone."""
        if process_count() == 1:
            return list(zip(micro_batches, sampled, strict=True))
        # a function of the step, so that a resumed run has the dropout that it would have had
        seeds = np.random.SeedSequence([self.seed, self.state.global_step, process_rank()])
        torch.manual_seed(int(seeds.generate_state(1)[0]))
        lengths = [len(ids) for ids in self.token_ids]
        settings = {"batch_size": self.phase.batch_size, "count": process_count()}
        first = share_rows(micro_batches, sampled, lengths, rank=0, **settings)
        self.most_batches = sum(bool(rows) for rows, _ in first)  # the first process has the most rows of each kind
        return share_rows(micro_batches, sampled, lengths, rank=process_rank(), **settings)

    def fill_empty(self, batches: list[dict[str, Any]]) -> None:
        """Of a sharded model, give this process a row that does not count in each micro-batch that only others have.

        It then gathers the weights with them. The row is the shortest of all; on-policy its answer is the end token.
        """
        if self.student.sharded is None:
            return
        row = min(range(len(self.token_ids)), key=lambda i: len(self.token_ids[i]))
        answers = [([self.student.tokenizer.eos_token_id], 0)] if self.phase.on_policy else None
        for batch in batches[: self.most_batches]:
            if not batch["micro_batch"].rows:
                batch["micro_batch"] = self.completions.micro_batch([row], answers)
                batch["micro_batch"].counted = False

    def count_step(self, counts: StepCounts) -> StepCounts:
        """`counts` of this process's share, summed over the processes."""
        return StepCounts(*sum_numbers([*vars(counts).values()], self.args.device))

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if process_count() == 1:
            return super().training_step(model, inputs, *args, **kwargs)
        loss = torch.zeros((), device=self.args.device)
        if inputs["micro_batch"].rows:
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.accelerator.sync_gradients and self.student.sharded is None:  # after the last micro-batch of the step
            sum_gradients(self.model.parameters())
        return loss * process_count()  # the trainer logs the mean over the processes

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def get_train_dataloader(self) -> Any:
        """All batches in every process; the trainer's own gives each another part of them."""
        if process_count() == 1:
            return super().get_train_dataloader()
        sampler, size = self._get_train_sampler(), self.args.per_device_train_batch_size
        loader = DataLoader(self.train_dataset, size, sampler=sampler, collate_fn=self.data_collator)
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0)


class PlainStep:
    """The trainer's own training step, in place of that of a class below."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return Trainer.training_step(self, *args, **kwargs)
