"""Start the processes that train together, show what the first one prints, and report the one that failed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

import distillery
from distillery.config.schema import ComputeConfig
from distillery.errors import UserError
from distillery.files import repository_root
from distillery.models.precision import VARIABLE, resolve_dtypes

MISTAKE = "DISTILLERY_MISTAKE"  # of the environment: the file for the message of a user's mistake
STARTED_BY = "DISTILLERY_STARTED_BY"  # of the environment: the process with which the others end
PROCESSES = "DISTILLERY_PROCESSES"  # of the environment: how many processes have to train together
FAILURE = re.compile(r"^\s*rank\s*:\s*(\d+) \(local_rank: \d+\)\n\s*exitcode\s*:\s*(-?\d+)", re.M)  # of a launcher
SHOWN_LINES = 40  # of the error output of processes that failed


def launch_command(compute: ComputeConfig, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that starts `module` in all processes: by torchrun, or as the file `compute.config` states."""
    if compute.config:
        launcher = ["accelerate.commands.launch", "--config_file", compute.config]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(compute.processes)]
    return [sys.executable, "-m", *launcher, "-m", module, *arguments]


def launch_environment(compute: ComputeConfig, mistake: Path) -> dict[str, str]:
    """The environment of the processes: they share the threads of this one, and end with it."""
    package = str(Path(distillery.__file__).parents[1])
    environment = os.environ | {
        MISTAKE: str(mistake),
        STARTED_BY: str(os.getpid()),
        PROCESSES: str(compute.processes),
        "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // compute.processes)),
        "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        VARIABLE: json.dumps(resolve_dtypes("auto")),
    }
    if not compute.config and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: its host name need not lead anywhere
    return environment


def run_processes(compute: ComputeConfig, module: str, arguments: Sequence[str], title: str) -> None:
    """Run `module` with `arguments` in the processes of `compute`, and print the lines of the first one.

    Raises UserError for a user's mistake in one of them, and when one was killed, with its rank; RuntimeError with the
    last lines of their error output when one failed otherwise. All have ended then.
    """
    with tempfile.TemporaryDirectory() as scratch:
        mistake, errors = Path(scratch) / "mistake", Path(scratch) / "errors"
        command, environment = launch_command(compute, module, arguments), launch_environment(compute, mistake)
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                command,
                cwd=repository_root(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
                errors="replace",
            )
            try:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                code = process.wait()
            finally:
                if process.poll() is None:  # interrupted here
                    process.terminate()
                    process.wait()
        if mistake.exists():
            raise UserError(mistake.read_text(encoding="utf-8"))
        if code:
            raise describe_failure(errors.read_text(encoding="utf-8", errors="replace"), compute.processes, title)


def describe_failure(report: str, processes: int, title: str) -> Exception:
    """The exception for `processes` that failed with the error output `report`: a UserError if one was killed.

    title: of the training, the start of the message.
    """
    # when one is killed, the others fail in the next exchange with it, and the launcher ends what is left
    codes = {int(rank): int(code) for rank, code in FAILURE.findall(report)}
    killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    if signal.SIGKILL in killed.values():
        killed = {rank: number for rank, number in killed.items() if number == signal.SIGKILL}
    for rank, number in killed.items():
        reason = " (out of memory?)" if number == signal.SIGKILL else ""
        return UserError(
            f"{title}: process {rank} of {processes}, counted from 0, was ended by {signal.Signals(number).name}"
            f"{reason}; run again: it continues from the last checkpoint"
        )
    lines = "\n".join(report.splitlines()[-SHOWN_LINES:])
    return RuntimeError(f"{title}: a process failed:\n{lines}")
