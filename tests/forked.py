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
# two servers: the more a process has loaded, the slower it forks, and DVC needs no torch
PROGRAMS = ("dvc.cli", "dvc.commands.repro", "dvc.repo.reproduce", "dvc.output", "papermill", "pyarrow.parquet")
PROGRAMS += ("distillery.pipeline.run_notebook", "distillery.pipeline.strip", "distillery.pipeline.inputs")
KERNELS = ("ipykernel.kernelapp", "distillery.training.run", "distillery.report.page")


@cache
def _start_server(*modules: str) -> str:
    """The socket of a process that runs Python programs in forks of itself; see tests/preloaded/server.py."""
    folder = tempfile.mkdtemp()
    address = f"{folder}/server"
    paths = [str(PRELOADED.parents[1] / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | stage_environment() | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(PRELOADED / "server.py"), address, *modules]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    # in a session of its own, an interrupt of the tests reaches it as the end of its standard input
    server = subprocess.Popen(command, env=environment, start_new_session=True, **streams)
    while not os.path.exists(address):
        assert server.poll() is None, "the process that loads the packages ended early"
        time.sleep(0.01)

    def stop() -> None:
        server.stdin.close()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
        shutil.rmtree(folder)

    atexit.register(stop)
    return address


@cache
def _can_watch_processes() -> bool:
    """Whether the system has the descriptors of processes that tests/preloaded/server.py waits for: Linux alone."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def preloaded_python(repo: Path, runs_kernels: bool = True) -> dict[str, str]:
    """Variables with which `dvc`, stages and kernels of the experiment in `repo` run in forks of a preloaded process.

    Do not use them where a test kills a process or changes a variable that Python or a library reads at its start: a
    fork has those of its server. Of the limits, it has that on the size of files. Where forks cannot be watched, there
    are no variables.
    """
    if not _can_watch_processes():
        return {}
    if not (repo / "src/sitecustomize.py").exists():
        shutil.copy(PRELOADED / "sitecustomize.py", repo / "src")
        with (repo / ".git/info/exclude").open("a") as ignored:
            ignored.write("src/sitecustomize.py\n")
    kernels = {"PRELOADED_KERNELS": _start_server(*KERNELS)} if runs_kernels else {}
    return {"PRELOADED_PROGRAMS": _start_server(*PROGRAMS), "PYTHONPATH": str(repo / "src")} | kernels
