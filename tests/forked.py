"""Processes of their own that need not load torch any more."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from distillery.pipeline.environment import ENVIRONMENT


@cache
def fork_context() -> ForkServerContext:
    """Starts processes as copies of one that has loaded the package, in the environment of a stage."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distillery.training.run", "tiny"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # or Python 3.11 preloads nothing, and does not say so
        for name, value in stage_environment().items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def stage_environment() -> dict[str, str]:
    """The variables of a stage, and the one that lets its kernel show figures."""
    shown = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    return {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()} | shown


PRELOADED = Path(__file__).parent / "preloaded"
# a copy of a process that has loaded less starts sooner
PROGRAMS = ("dvc.cli", "dvc.commands.repro", "dvc.repo.reproduce", "dvc.output", "papermill", "pyarrow.parquet")
PROGRAMS += ("distillery.pipeline.run_notebook", "distillery.pipeline.strip", "distillery.pipeline.inputs")
KERNELS = ("ipykernel.kernelapp", "distillery.training.run", "distillery.report.page")


@cache
def _start_server(*modules: str) -> str:
    """The socket of a process that runs programs of Python in copies of itself; see tests/preloaded/server.py."""
    folder = tempfile.mkdtemp()
    address = f"{folder}/server"
    paths = [str(PRELOADED.parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | stage_environment() | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(PRELOADED / "server.py"), address, *modules]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while not os.path.exists(address):
        assert server.poll() is None, "the process that loads the packages ended early"
        time.sleep(0.01)

    def stop() -> None:
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    atexit.register(stop)
    return address


def preloaded_python(repo: Path, runs_kernels: bool = True) -> dict[str, str]:
    """Variables with which `dvc`, stages and kernels of the experiment in `repo` need not load their packages.

    Not for a program that shall be killed, or that reads other variables of Python or of a library than a stage does.
    Where the system lacks what tests/preloaded/server.py needs, they run as they are.
    """
    if not hasattr(os, "pidfd_open"):
        return {}
    if not (repo / "src/sitecustomize.py").exists():
        shutil.copy(PRELOADED / "sitecustomize.py", repo / "src")
        with (repo / ".git/info/exclude").open("a") as ignored:
            ignored.write("src/sitecustomize.py\n")
    kernels = {"PRELOADED_KERNELS": _start_server(*KERNELS)} if runs_kernels else {}
    return {"PRELOADED_PROGRAMS": _start_server(*PROGRAMS), "PYTHONPATH": str(repo / "src")} | kernels
