"""The processes that train one model together, and what they exchange. One process alone exchanges nothing.

A launcher such as torchrun starts them and sets RANK, LOCAL_RANK and WORLD_SIZE; :func:`join_processes` joins them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor, distributed

from distillery.errors import UserError
from distillery.models.devices import VARIABLE, default_device

Value = TypeVar("Value")

# a process that waits for another one, which may compute a teacher's outputs, does not give up; the launcher ends all
# when one has died
PATIENCE = timedelta(days=7)
BUCKET_BYTES = 2**26  # of gradients that are summed in one message


@contextmanager
def join_processes() -> Iterator[None]:
    """Take part in the training of the processes that a launcher started, within the context.

    Raises UserError when there are fewer GPUs than processes on this machine.
    """
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    on_cpu = os.environ.get(VARIABLE) == "cpu" or not gpus
    if not on_cpu and local_rank >= gpus:
        raise UserError(f"compute.processes: process {local_rank} of a machine with {gpus} GPUs: each needs its own")
    if not on_cpu:
        torch.cuda.set_device(local_rank)  # before anything is computed on the first GPU
    if default_device().type == "mps":
        raise UserError(f"compute.processes: Apple's GPU serves one process; set `processes: 1` or {VARIABLE}=cpu")
    PartialState(cpu=on_cpu, timeout=PATIENCE)
    try:
        yield
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def process_count() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def process_rank() -> int:
    """The number of this process among those that train together, from 0."""
    return distributed.get_rank() if process_count() > 1 else 0


def wait_for_all() -> None:
    """Wait until every process has come here."""
    if process_count() > 1:
        distributed.barrier()


def from_first(compute: Callable[[], Value]) -> Value:
    """What `compute` returns in the first process, which alone calls it, in all of them."""
    if process_count() == 1:
        return compute()
    values = [compute() if process_rank() == 0 else None]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block, then all others do, which find in the cache what it has left there."""
    if process_rank() > 0:
        wait_for_all()
    yield
    if process_rank() == 0:
        wait_for_all()


def gather(value: Value) -> list[Value]:
    """`value` of every process, by rank."""
    if process_count() == 1:
        return [value]
    values: list[Any] = [None] * process_count()
    distributed.all_gather_object(values, value)
    return values


def sum_numbers(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The sum over the processes of each of `numbers`, which are equally many in all of them."""
    if process_count() == 1:
        return list(numbers)
    sums = torch.tensor(list(numbers), device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def sum_values(values: dict[str, float]) -> dict[str, float]:
    """The sum over the processes of the values of each key; a process may lack some."""
    sums: dict[str, float] = {}
    for part in gather(values):
        for key, value in part.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def computing_processes() -> int:
    """How many processes, the first ones, may write into one file: all that train together on one machine, else one."""
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", process_count()))
    return process_count() if on_this_machine == process_count() else 1


def share_weights(weights: Iterable[Tensor]) -> None:
    """Give all processes the `weights` of the first one: two kinds of machine may differ in their last bits."""
    if process_count() > 1:
        for weight in weights:
            distributed.broadcast(weight.data, src=0)


@torch.no_grad()
def sum_gradients(weights: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of the trained `weights` over the processes. One that no process has stays None.

    A sum and no mean: the loss of each process is already divided by what the step holds in all of them.
    """
    trained = [weight for weight in weights if weight.requires_grad]
    has_gradient = sum_numbers([int(weight.grad is not None) for weight in trained], trained[0].device)
    waiting = []
    for bucket in _buckets([weight for weight, count in zip(trained, has_gradient, strict=True) if count]):
        parts = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket]
        flat = torch.cat([part.reshape(-1) for part in parts])
        for weight, part in zip(bucket, flat.split([weight.numel() for weight in bucket]), strict=True):
            weight.grad = part.view_as(weight)
        waiting.append(distributed.all_reduce(flat, async_op=True))
    for work in waiting:
        work.wait()


def _buckets(weights: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """`weights` in lists of one number format and about :data:`BUCKET_BYTES`."""
    for dtype in dict.fromkeys(weight.dtype for weight in weights):
        bucket, size = [], 0
        for weight in (weight for weight in weights if weight.dtype == dtype):
            bucket.append(weight)
            size += weight.nbytes
            if size >= BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket
