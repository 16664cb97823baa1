"""Try every path of this project that differs on a GPU, one after the other, and print one table.

    PYTHONPATH=src python benchmarks/gpu_check.py [--minutes 10] [--device cpu] [--only WORD ...] [--dry-run]

Models are tiny and random, or have the shape of Qwen2.5-1.5B and 0.5B with random weights: nothing is downloaded. Each
check runs in a process of its own, so that one that fails, hangs or breaks the GPU's context leaves the others alone. A
check that would start after the budget is skipped. `--device cpu` runs what a CPU can, with the smallest shapes, to try
the checks themselves. `--log` gets what the checks print, with the traceback of each that fails.

Prints a line for each check: its result (ok, failed, skipped, not here), seconds, the peak of GPU memory, and a figure;
then the versions. The exit code is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src"), str(Path(__file__).parent)]

from gpu_checks import CHECKS, Check, Place, use_device  # noqa: E402 - its folder is on the path from here on

# CUDA may start in the processes of the checks alone: a copy of a process in which it runs cannot use it
OFFLINE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
ANEW = "GPU_CHECK_ANEW"  # of the environment: let each process load everything anew
LONGEST_DETAIL = 400  # characters
DEVICES = ("cuda", "mps", "cpu")


def run_in_process(function: Any, *arguments: Any, log: Path, seconds: float) -> tuple[Any, str, int]:
    """What `function` returns in a process of its own, or the error in one line; and the peak of GPU memory, bytes."""
    context = multiprocessing.get_context(start_method())
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, log, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return None, f"ended after {seconds:.0f} s", 0
        return receiver.recv()
    except EOFError:
        process.join(10)
        return None, f"its process ended with code {process.exitcode}", 0
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what it has started
        process.join()


def start_method() -> str:
    """How a process starts: a copy of this one saves seconds; where CUDA runs here, or on macOS, GPUs fail in it."""
    torch = sys.modules.get("torch")
    if os.environ.get(ANEW) or sys.platform == "darwin" or (torch and torch.cuda.is_initialized()):
        return "spawn"
    return "fork"


def _send_result(sender: Connection, log: Path, function: Any, arguments: tuple) -> None:
    """Runs in the process of a check. All that it prints goes to the file `log`."""
    os.setsid()
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        answer, error = function(*arguments), ""
    except BaseException as problem:
        traceback.print_exc()
        lines = str(problem).strip().splitlines() or [""]
        answer, error = None, f"{type(problem).__name__}: {lines[0]}"
    sender.send((answer, error, _gpu_peak()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries that hang at their end have nothing more to do


def _gpu_peak() -> int:
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_allocated() if torch and torch.cuda.is_initialized() else 0


def find_device() -> str:
    """The device that is chosen where none is named. Runs in a process of its own."""
    from distillery.models.devices import default_device

    return default_device().type


def has_cuda() -> bool:
    """Whether torch sees a CUDA GPU."""
    torch = sys.modules.get("torch")
    return bool(torch and torch.cuda.is_available())


def prepare(models: Path) -> str:
    """Write the tiny models to `models`. Runs in a process of its own."""
    import tiny

    use_device("cpu")
    tiny.build_models(models)
    return ""


def run_check(check: Check, place: Place) -> str:
    """The figure of `check`. Runs in a process of its own."""
    use_device(place.device)
    place.folder.mkdir(parents=True)
    print(f"\n==== {check.name}", flush=True)
    return getattr(importlib.import_module(f"gpu_checks.{check.module}"), check.function)(place)


def missing_packages(check: Check) -> list[str]:
    """The packages that `check` needs and that are not installed."""

    def is_missing(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except ModuleNotFoundError:  # the package around it
            return True

    return [name for name in check.packages if is_missing(name)]


def print_row(*cells: Any) -> None:
    """One line of the table."""
    print("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |", flush=True)


def print_header(*names: str) -> None:
    """The first two lines of the table."""
    print_row(*names)
    print_row(*("---" for _ in names))


def print_versions(log: Path) -> None:
    """The versions of the libraries, and the GPU."""
    for name in LIBRARIES:
        try:
            print(f"{name} {version(name)}", end=", ")
        except PackageNotFoundError:
            print(f"no {name}", end=", ")
    machine, error, _ = run_in_process(_machine, log=log, seconds=60)
    print(f"Python {platform.python_version()}; {machine or error}", flush=True)


def _machine() -> str:
    import torch

    from distillery.training.machine import machine_name

    memory = f", {torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB" if torch.cuda.is_available() else ""
    return f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; {machine_name()}{memory}"


def preload() -> None:
    """Import what most checks import: the process of a check is a copy of this one. A check reports what is missing."""
    for module in ("torch", "distillery.training.run", "distillery.teachers.local", "distillery.evaluation.speed"):
        try:
            importlib.import_module(module)
        except ImportError:
            return


def run_checks(checks: list[Check], device: str, scratch: Path, log: Path, budget: float) -> int:
    """Print the table of `checks`; how many failed. budget: seconds."""
    start, failed = time.perf_counter(), 0
    preload()
    models = scratch / "models"
    if not device:
        device, error, _ = run_in_process(find_device, log=log, seconds=120)
        if device in (None, "cpu") and start_method() == "fork" and has_cuda():
            os.environ[ANEW] = "1"  # a library has started CUDA here without torch's knowing
            device, error, _ = run_in_process(find_device, log=log, seconds=120)
        if error:
            print(f"error: no device: {error}", file=sys.stderr)
            return 1
    if device == "cpu":
        print("The checks run on the CPU, with the smallest shapes: they say nothing of a GPU.")
    _, error, _ = run_in_process(prepare, models, log=log, seconds=120)
    if error:
        print(f"error: the tiny models cannot be written: {error}", file=sys.stderr)
        return 1
    print_header("check", "result", "seconds", "peak GPU memory, MiB", "detail")
    for number, check in enumerate(checks):
        began = time.perf_counter()
        missing = missing_packages(check)
        if missing or (check.cuda and device != "cuda"):
            print_row(check.name, "not here", "", "", f"needs {', '.join(missing) or 'a CUDA GPU'}")
            continue
        left = budget - (began - start)
        if left <= 0:
            print_row(check.name, "skipped", "", "", f"the budget of {budget / 60:g} minutes is spent")
            continue
        place = Place(device, models, scratch / str(number))
        detail, error, peak = run_in_process(run_check, check, place, log=log, seconds=check.seconds)
        failed += bool(error)
        took, memory = f"{time.perf_counter() - began:.1f}", f"{peak / 2**20:.0f}" if peak else ""
        print_row(check.name, "failed" if error else "ok", took, memory, (error or detail)[:LONGEST_DETAIL])
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run the checks; the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="after these no check starts")
    parser.add_argument("--device", choices=DEVICES, default="", help="in place of the first that works")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="parts of the names of checks to run")
    parser.add_argument("--log", type=Path, help="the file for what the checks print")
    parser.add_argument("--dry-run", action="store_true", help="list the checks and what each needs")
    options = parser.parse_args(arguments)
    checks = [check for check in CHECKS if any(word in check.name for word in options.only)]
    if options.dry_run:
        print_header("check", "needs")
        for check in checks:
            print_row(check.name, check.needs)
        return 0
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        log = (options.log or Path(scratch) / "log").absolute()
        failed = run_checks(checks, options.device, Path(scratch), log, 60 * options.minutes)
        print_versions(log)
    print(f"{len(checks)} checks, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
