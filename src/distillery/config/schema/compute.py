"""The section `compute`: on how many processes a training runs. It decides no result beyond rounding."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distillery.config.schema.base import Section

ONE_PROCESS_TERM = (
    "loss.label_prior: it is a mean over the rows of one process, which does not add up over several; set "
    "`compute.processes: 1`"
)
FSDP_OPTIMIZER = "its states cannot be cut into shards; take `adamw`, or set `compute.strategy: ddp`"
FSDP_4_BIT = "weights in 4 bits cannot be cut into shards; set `compute.strategy: ddp`"


class ComputeConfig(Section):
    """On what students and teachers are trained. It changes no result beyond rounding, and reruns no stage."""

    processes: Annotated[int, Field(gt=0)] = 1
    """Processes that share the rows of each optimizer step, on machines with GPUs one for each GPU. 1: the process of
    the notebook trains, and two runs agree to the last bit."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the processes share the work. `ddp`: each holds the whole model, and their gradients are summed. `fsdp`: each
    holds a part of every weight, gradient and optimizer state, and gathers a layer when it is called: for models whose
    training does not fit one GPU."""
    config: str | None = None
    """A configuration file of `accelerate`, relative to the repository: `accelerate launch` then starts the processes
    as it states. It may name machines and network addresses; it must not shard the model. Its number format and
    compilation are not taken. accelerate starts the processes of a file for CPUs (`MULTI_CPU`) by `mpirun` alone."""

    @model_validator(mode="after")
    def _config_names_processes(self):
        if self.config and self.processes == 1:
            raise ValueError("`config` needs `processes`, the number of processes that it starts")
        return self

    @model_validator(mode="after")
    def _shards_over_several(self):
        if self.strategy == "fsdp" and self.processes == 1:
            raise ValueError("`strategy: fsdp` shards a model over several `processes`, and there is 1")
        return self
