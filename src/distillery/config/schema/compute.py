"""The section `compute`: on how many processes a training runs. It decides no result beyond rounding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distillery.config.schema.base import Section


class ComputeConfig(Section):
    """On what students and teachers are trained. It changes no result beyond rounding, and reruns no stage."""

    processes: Annotated[int, Field(gt=0)] = 1
    """Processes that share the rows of each optimizer step, on machines with GPUs one for each GPU. 1: the process of
    the notebook trains, and two runs agree to the last bit."""
    strategy: Literal["ddp"] = "ddp"
    """How the processes share the work. `ddp`: each holds the whole model, and their gradients are summed."""
    config: str | None = None
    """A configuration file of `accelerate`, relative to the repository: `accelerate launch` then starts the processes
    as it states. It may name machines and network addresses; it must not shard the model."""
