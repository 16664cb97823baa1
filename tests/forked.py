"""Processes that need not load torch or DVC any more: they are forks of one that has."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
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


ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ROOT / "tests/preloaded"
ENVIRONMENT_AT_START = dict(os.environ)  # before any test changes it
# two servers: the more a process has loaded, the slower it forks, and DVC needs no torch
DVC = ("dvc.cli", "dvc.commands.repro", "dvc.repo.reproduce", "dvc.output", "papermill", "pyarrow.parquet")
DVC += ("distillery.pipeline.run_notebook", "distillery.pipeline.strip", "distillery.pipeline.inputs")
DVC += ("pip._internal.cli.main", "pip._internal.commands.download")
TORCH = ("ipykernel.kernelapp", "distillery.training.run", "distillery.report.page")
TORCH += ("torch.distributed.run", "accelerate.commands.launch")


def preloaded_server(name: str, *modules: str) -> str:
    """The socket of a process that runs Python programs in forks of itself; see tests/preloaded/server.py.

    The processes of a test run share it, and it ends with the run.
    """
    run = psutil.Process(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid())
    folder = Path(tempfile.gettempdir()) / f"preloaded-{run.pid}-{run.create_time():.0f}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.lstat().st_uid == os.getuid(), f"{folder} belongs to another user"
    address, path = folder / name, [str(ROOT / "src"), *filter(None, [ENVIRONMENT_AT_START.get("PYTHONPATH")])]
    environment = ENVIRONMENT_AT_START | stage_environment() | {"PYTHONPATH": os.pathsep.join(path)}
    environment.pop("PYTHONUNBUFFERED", None)  # an unbuffered stream cannot be buffered later
    command = [sys.executable, str(PRELOADED / "server.py"), str(address), str(run.pid), *modules]
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _answers(address):
            address.unlink(missing_ok=True)
            # in a session of its own, an interrupt of the tests reaches it as the end of the run
            options = {"cwd": ROOT, "start_new_session": True, "stdin": subprocess.DEVNULL}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, **options)
    return str(address)


def _answers(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0


@cache
def _can_watch_processes() -> bool:
    """Whether the system has the descriptors of processes that tests/preloaded/server.py waits for: Linux alone."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return False
    return True


def preloaded_python(repo: Path | None = None, with_torch: bool = True) -> dict[str, str]:
    """Variables with which `dvc`, pip, stages, kernels and launchers run in forks of a preloaded process.

    repo: the folder of an experiment, whose package they import; without it, they import that of this folder.
    with_torch: whether kernels and launchers are among them. Do not use them where a test kills a process or changes a
    variable that Python or a library reads at its start: a fork has those of its server. Of the limits, it has that on
    the size of files. Where forks cannot be watched, PYTHONPATH is the only variable.
    """
    package = (repo or ROOT) / "src"
    if not _can_watch_processes():
        return {"PYTHONPATH": str(package)}
    variables = {"PYTHONPATH": str(package) if repo else f"{package}{os.pathsep}{PRELOADED}"}
    if repo:
        shutil.copy(PRELOADED / "sitecustomize.py", repo / "src")
        ignored = repo / ".git/info/exclude"
        if "sitecustomize.py" not in ignored.read_text():
            with ignored.open("a") as file:
                file.write("src/sitecustomize.py\n")
    if with_torch:
        variables["PRELOADED_TORCH"] = preloaded_server("torch", *TORCH)
    return variables | {"PRELOADED_DVC": preloaded_server("dvc", *DVC)}
