"""The checks of `benchmarks/gpu_check.py`: one for each path of this project that differs on a GPU.

A check is a function of a :class:`Place`. It returns the figure that the table shows, and raises where the path fails.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

TRAINING = ("trl", "datasets", "pydantic", "ruamel.yaml", "peft", "accelerate")  # what a training imports
NOTEBOOKS = (*TRAINING, "IPython", "matplotlib_inline")


@dataclass(frozen=True)
class Place:
    """Where a check runs: on which device, with the tiny models in `models`, and with a `folder` of its own."""

    device: str
    models: Path
    folder: Path

    @property
    def is_gpu(self) -> bool:
        """Whether shapes are those of a GPU; on a CPU they are the smallest ones."""
        return self.device != "cpu"


@dataclass(frozen=True)
class Check:
    """A check: its name in the table, its module and function, what it needs, the seconds after which it is ended."""

    name: str
    module: str
    function: str
    packages: tuple[str, ...] = TRAINING
    cuda: bool = False  # whether it makes no sense elsewhere
    seconds: float = 90.0

    @property
    def needs(self) -> str:
        """What it needs, in words."""
        return ", ".join([*(["a CUDA GPU"] if self.cuda else []), *self.packages])


# the most important first; at equal importance the cheap ones
CHECKS = [
    Check("device and `dtype: auto`", "methods", "choose_device_and_dtype"),
    Check("classifier, CE and KL: losses of the CPU", "students", "classifier_like_the_cpu"),
    Check("causal, LoRA, JSD over the vocabulary: losses of the CPU", "students", "causal_like_the_cpu"),
    Check("encoder-decoder: losses of the CPU", "students", "seq2seq_like_the_cpu"),
    Check("two runs give the same bits", "students", "same_bits"),
    Check("a killed run continues with the same bits", "students", "continued_run"),
    Check("QLoRA: train, merge, reopen", "students", "qlora", (*TRAINING, "bitsandbytes")),
    Check("float16 with scaled gradients", "students", "float16"),
    Check("on-policy: generate and train", "students", "on_policy"),
    Check("sampling with top_p", "methods", "nucleus_sampling"),
    Check("token trees against the plain forward pass", "methods", "forward_methods"),
    Check("recorded passes against plain ones", "methods", "recorded_steps"),
    Check("gradient checkpointing", "students", "gradient_checkpointing"),
    Check("deterministic algorithms by architecture", "methods", "deterministic_architectures"),
    Check("a teacher in int8", "methods", "int8_teacher"),
    Check("a step of 1.5B to 0.5B beside TRL's GKDTrainer", "shapes", "beside_trl", seconds=150.0),
    Check(
        "every stage of a tiny experiment", "stages", "whole_experiment", (*NOTEBOOKS, "bitsandbytes"), seconds=240.0
    ),
    Check("tests/test_devices.py on this device", "stages", "device_tests", (*TRAINING, "pytest", "hypothesis")),
    Check(
        "04_distill through papermill",
        "stages",
        "papermill_stage",
        (*NOTEBOOKS, "papermill", "ipykernel"),
        seconds=150.0,
    ),
    Check("one process under torchrun (NCCL on CUDA)", "stages", "torchrun_process", seconds=150.0),
    Check("more processes than GPUs is one line", "stages", "too_many_processes", cuda=True),
    Check("memory of LoRA, checkpointing and QLoRA", "shapes", "memory_of_a_student", (*TRAINING, "bitsandbytes")),
]


def use_device(name: str) -> None:
    """Let the next models of this process lie on device `name`."""
    os.environ["DISTILLERY_DEVICE"] = name
