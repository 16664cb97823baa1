"""Settings of torch and transformers for a whole process, made when work with models starts."""

from __future__ import annotations

import os

import torch
from transformers.utils import logging as transformers_logging

from distillery.models.devices import CUBLAS_WORKSPACE, NO_DETERMINISM, default_device


def configure_runtime() -> None:
    """Make results repeatable to the bit on one machine, and silence transformers' remarks and progress bars.

    Loading a model and building a :class:`LabelModel` call this, an import does not; a second call changes nothing.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)  # before CUDA starts, when cuBLAS reads it
    torch.use_deterministic_algorithms(True, warn_only=default_device().type in NO_DETERMINISM)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that writes every buffer twice
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
