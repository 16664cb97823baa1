"""Processes of their own that need not load torch any more."""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

import pytest

from distillery.pipeline.environment import ENVIRONMENT


@cache
def fork_context() -> ForkServerContext:
    """Starts processes as copies of one that has loaded the package, in the environment of a stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distillery.training.run", "tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or Python 3.11 preloads nothing, and does not say so
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, os.environ.get(name, value))
        patch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # that of a kernel
        forkserver.ensure_running()
    return context
